"""Real photographs and real ImageNet weights: what the README's table claims, within what seeds vary."""

import csv
import json
import statistics
from pathlib import Path

import pytest

from resnet_dist.cli import main


def trained(run: Path, *arguments: str | Path) -> float:
    """Train and return the best checkpoint's top-1 on the validation images, in float32."""
    assert main(["train", *map(str, arguments), "-o", str(run), "--save-every", "99epochs"]) == 0
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
    """At least 0.93 with the issue's command; random weights far below; discriminative within two points."""
    data = shared / "hymenoptera"
    head = ["--recipe", "feature-extractor-bn-eval", "--lr", "1e-2", "--batch-size", "32", "--epochs", "3"]
    scores = [trained(tmp_path / f"head{seed}", data, *weights, *head, "--seed", str(seed)) for seed in (0, 1, 2)]
    assert scores[0] >= 0.93 and statistics.mean(scores) >= 0.93
    assert trained(tmp_path / "random", data, "--model", "resnet18", "--weights", "none", *head) < 0.75
    both = ["--recipe", "discriminative", "--batch-size", "32", "--epochs", "6"]
    others = [trained(tmp_path / f"all{seed}", data, *weights, *both, "--seed", str(seed)) for seed in (0, 1, 2)]
    assert statistics.mean(others) >= statistics.mean(scores) - 0.02


@pytest.mark.matrix
def test_fruits(shared: Path, weights: list[str], tmp_path: Path) -> None:
    options = ["--recipe", "fruits360", "--batch-size", "32", "--epochs", "3"]
    assert trained(tmp_path / "run", shared / "fruits", *weights, *options) >= 0.95


@pytest.mark.matrix
def test_cats_and_dogs_through_split(shared: Path, weights: list[str], tmp_path: Path) -> None:
    manifest = tmp_path / "split.csv"
    assert main(["split", str(shared / "cats_dogs"), str(manifest)]) == 0
    options = ["--recipe", "feature-extractor-bn-eval", "--batch-size", "32", "--epochs", "1"]
    assert trained(tmp_path / "run", manifest, *weights, *options) >= 0.93


@pytest.mark.matrix
def test_cifar10_from_scratch_learns(shared: Path, tmp_path: Path) -> None:
    options = ["--recipe", "cifar10-from-scratch", "--epochs", "4", "--lr", "0.05"]
    assert trained(tmp_path / "run", shared / "cifar10", *options) > 0.2
