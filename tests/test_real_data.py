"""Real photographs and real ImageNet weights: what the README's table claims, within what seeds vary."""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from resnet_dist.cli.main import main


def trained(run: Path, *arguments: str | Path) -> float:
    """Train and return the best checkpoint's top-1 on the validation images, in float32."""
    assert main(["train", *map(str, arguments), "-o", str(run), "--save-every", "99epochs", "--no-report"]) == 0
    best = json.loads((run / "run.json").read_text())["best"]
    return float(best["top1"])


@pytest.fixture
def weights(shared: Path) -> list[str]:
    return ["--model", "resnet18", "--weights", str(shared / "weights/resnet18.safetensors")]


def test_one_epoch_of_a_new_head(shared: Path, weights: list[str], tmp_path: Path) -> None:
    """The ordinary suite's glimpse of the real data: already far above chance, and eval agrees with train."""
    options = ["--recipe", "feature-extractor-bn-eval", "--lr", "1e-2", "--opt", "sgd", "-b", "32", "--epochs", "1"]
    top1 = trained(tmp_path / "run", shared / "hymenoptera", *weights, *options)
    assert top1 > 0.85
    with (tmp_path / "run/eval/val/predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 153
    assert statistics.mean(row["target"] == row["prediction"] for row in rows) == pytest.approx(top1)


@pytest.mark.matrix
def test_feature_extractor_and_discriminative(shared: Path, weights: list[str], tmp_path: Path) -> None:
    """Both as good as a plain torch loop with these weights (0.94 to 0.95); random weights are far below."""
    data = shared / "hymenoptera"
    head = ["--recipe", "feature-extractor-bn-eval", "--lr", "1e-2", "--batch-size", "32"]
    head += ["--aug", "none", "--epochs", "10"]  # from kept features: one pass through the network
    assert trained(tmp_path / "head", data, *weights, *head) >= 0.93
    random = ["--model", "resnet18", "--weights", "none", "--img-size", "64", "--resize", "72"]
    assert trained(tmp_path / "random", data, *random, *head) < 0.75
    both = ["--recipe", "discriminative", "--batch-size", "32", "--epochs", "3"]
    both += ["--img-size", "144", "--resize", "164"]  # a third of the time; 0.952 with 224 pixels and six epochs
    assert trained(tmp_path / "all", data, *weights, *both) >= 0.86


def linked(data: Path, place: Path, splits: Sequence[str], classes: Sequence[str], images: Sequence[int]) -> Path:
    """A folder of links to the first images of these classes, as many in each split as `images` says."""
    for split, count in zip(splits, images, strict=True):
        for name in classes:
            (place / split / name).mkdir(parents=True)
            for file in sorted((data / split / name).iterdir())[:count]:
                (place / split / name / file.name).symlink_to(file)
    return place


@pytest.mark.matrix
def test_fruits(shared: Path, weights: list[str], tmp_path: Path) -> None:
    """One epoch of eight of the classes, in small batches."""
    data, classes = shared / "fruits", sorted(path.name for path in (shared / "fruits/Training").iterdir())[:8]
    data = linked(data, tmp_path / "data", ("Training", "Testing"), classes, (1000, 1000))
    options = ["--recipe", "fruits360", "--batch-size", "8", "--epochs", "1"]
    assert trained(tmp_path / "run", data, *weights, *options) >= 0.95


@pytest.mark.matrix
def test_cifar10_from_scratch_learns(shared: Path, tmp_path: Path) -> None:
    """One epoch of 450 images of three classes: above chance, which is 0.33 with a standard error of 0.035."""
    classes = ("airplane", "automobile", "frog")
    data = linked(shared / "cifar10", tmp_path / "data", ("train", "test"), classes, (150, 60))
    options = ["--recipe", "cifar10-from-scratch", "--epochs", "1", "--lr", "0.02", "-b", "8"]
    assert trained(tmp_path / "run", data, *options) > 0.45
