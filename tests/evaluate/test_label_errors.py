"""Label errors: the paper's definition by brute force, wrong labels that we put in, probabilities out of fold."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from resnet_dist.cli import main
from resnet_dist.config import ModelConfig
from resnet_dist.evaluate import label_errors
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.report.on_disk import read_run_evaluation
from tests.conftest import TINY, make_folder
from tests.report.pages import made_records


def brute_force(target: list[int], probabilities: list[list[float]]) -> list[tuple[bool, int, float]]:
    """(suspected, likely, quality) of each image, as the paper words it, one image at a time."""
    classes = range(len(probabilities[0]))
    thresholds = {}
    for j in classes:
        own = [p[j] for p, t in zip(probabilities, target, strict=True) if t == j]
        if own:
            thresholds[j] = sum(own) / len(own)
    found = []
    for p, t in zip(probabilities, target, strict=True):
        above = [j for j in thresholds if p[j] >= thresholds[j]]
        counted = max(above, key=lambda j: p[j]) if above else t
        best_other = max((j for j in classes if j != t), key=lambda j: p[j])
        found.append((counted != t, counted if counted != t else best_other, (p[t] - p[best_other] + 1) / 2))
    return found


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(n=st.integers(1, 30), classes=st.integers(2, 6), seed=st.integers(0, 10_000))
def test_equals_the_definition(n: int, classes: int, seed: int) -> None:
    """Also where a class has no images."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, classes, n)
    probabilities = generator.dirichlet(np.full(classes, 0.5), n)
    found, wanted = label_errors.find(target, probabilities), brute_force(target.tolist(), probabilities.tolist())
    # A mean in another order of addition may differ in its last digit, which decides at the very threshold.
    edge = {t: np.mean(probabilities[target == t, t]) for t in set(target.tolist())}
    for i, (suspected, likely, quality) in enumerate(wanted):
        assert found.quality[i] == pytest.approx(quality)
        if all(abs(probabilities[i, t] - value) > 1e-12 for t, value in edge.items()):
            assert (bool(found.suspected[i]), int(found.likely[i])) == (suspected, likely)
    order = found.order.tolist()
    assert sorted(order) == list(range(n))
    keys = [(not found.suspected[i], found.quality[i]) for i in order]
    assert keys == sorted(keys)


def test_records_hold_enough_where_there_are_up_to_five_classes() -> None:
    """All probabilities are in the records then, so that nothing is lost."""
    records = made_records(np.arange(200) % 5, 5, right=0.6)
    full = np.empty((200, 5), np.float32)
    np.put_along_axis(full, records.classes, records.probabilities, axis=1)
    found, wanted = label_errors.find_in_records(records, 5), label_errors.find(records.target, full)
    assert np.array_equal(found.suspected, wanted.suspected) and np.array_equal(found.likely, wanted.likely)
    assert found.quality == pytest.approx(wanted.quality, abs=1e-6)
    assert 0 < found.suspected.sum() < 200


def test_the_label_counts_where_it_is_not_among_the_five_best() -> None:
    """Its probability comes through the loss: the quality is the true one."""
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=(50, 20)) * 3)
    target = logits.argmin(dim=1)
    exact = logits.softmax(1).numpy()
    top = logits.softmax(1).topk(5)
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none").float().numpy()
    records = label_errors.Records(target.numpy(), loss, top.indices.numpy(), top.values.float().numpy())
    found = label_errors.find_in_records(records, 20)
    assert found.quality == pytest.approx(label_errors.find(target.numpy(), exact).quality, abs=1e-6)


def test_out_of_fold_is_fitted_on_the_other_folds() -> None:
    """Equal to fitting each fold by hand; a label has no part in its own probabilities."""
    generator = np.random.default_rng(0)
    target = np.arange(60) % 3
    features = (generator.normal(size=(60, 8)) + 2 * np.eye(3, 8)[target]).astype(np.float32)
    found = label_errors.out_of_fold(features, target, folds=4)
    wanted = np.zeros((60, 3))
    for fitted, judged in StratifiedKFold(4, shuffle=True, random_state=0).split(features, target):
        scaler = StandardScaler().fit(features[fitted])
        regression = LogisticRegression(C=label_errors.REGULARISATION, max_iter=1000)
        regression.fit(scaler.transform(features[fitted]), target[fitted])
        wanted[judged] = regression.predict_proba(scaler.transform(features[judged]))
    assert found == pytest.approx(wanted)
    assert found.sum(axis=1) == pytest.approx(np.ones(60))


# The verb


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from random weights on 20 training images of each of two classes, three of them in the other's folder."""
    place = tmp_path_factory.mktemp("labels")
    data = make_folder(place / "data", train=20, val=3, classes=("cat", "dog"))
    for i in range(3):
        file = data / "train" / "cat" / f"train{i:03d}.png"
        shutil.move(file, data / "train" / "dog" / f"wrong{i}.png")
    assert main(["train", str(data), "-o", str(place / "run"), *TINY, "--epochs", "1"]) == 0
    return place / "run"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random but fixed weights for the tiny network: enough to tell tints apart."""
    file = tmp_path_factory.mktemp("weights") / "random.safetensors"
    torch.manual_seed(0)
    model = build(Architecture.of(ModelConfig(model="resnet18", weights="none", stem="small"), 2))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return file


def test_misplaced_images_come_first(run: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weights", str(weights), "--workers", "0", "--threads", "1"]
    assert main(["label-errors", str(run), *options]) == 0
    with (run / "label_errors.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 40
    assert {row["path"] for row in rows[:3]} == {f"train/dog/wrong{i}.png" for i in range(3)}
    assert all((row["label"], row["likely"]) == ("dog", "cat") for row in rows[:3])
    suspected = [row["path"] for row in rows if row["suspected"] == "1"]
    assert suspected and all("wrong" in path for path in suspected)
    assert "wrong0.png: labelled dog, likely cat" in capsys.readouterr().out
    assert main(["report", str(run), "--no-near-duplicates"]) == 0


def test_what_cannot_judge_is_said(run: Path, weights: Path, refused: Callable[..., str]) -> None:
    said = refused(2, "label-errors", run)
    assert "--weights is missing" in said and "random weights" in said
    config, begun = run / "config.toml", (run / "config.toml").read_text()
    config.write_text(begun.replace("[run]\n", '[run]\ninit_from = "older"\n'))
    said = refused(2, "label-errors", run)
    config.write_text(begun)
    assert "began from the run older" in said and "random" not in said
    said = refused(2, "label-errors", run, "--weights", weights, "--folds", "18", "--workers", "0")
    assert "--folds 18: class 'cat' has 17 training images" in said
    assert "--folds 1: must be at least 2" in refused(2, "label-errors", run, "--folds", "1")
    assert "--weights none" in refused(2, "label-errors", run, "--weights", "none")


# Real photographs


def wrong_labels(data: Path, file: Path, split: str, share: float = 0.05) -> set[str]:
    """A manifest of cats and dogs in which that share of a split's labels is wrong; gives the paths of those."""
    clean = file.with_name("clean.csv")
    assert main(["split", str(data), str(clean)]) == 0
    with clean.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    ours = [row for row in rows if row["split"] == split]
    chosen = np.random.default_rng(0).choice(len(ours), round(share * len(ours)), replace=False)
    for i in chosen:
        ours[i]["label"] = {"Cat": "Dog", "Dog": "Cat"}[ours[i]["label"]]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return {ours[i]["path"] for i in chosen}


@pytest.mark.matrix
@pytest.mark.parametrize("split", ["val", "train"])
def test_wrong_labels_among_photographs(shared: Path, tmp_path: Path, split: str) -> None:
    """Of 5 % wrong labels at least 70 % are in the first tenth: of the network's rank, and of the one out of fold."""
    wrong = wrong_labels(shared / "cats_dogs", tmp_path / "wrong.csv", split)
    recipe = ["--recipe", "feature-extractor-bn-eval", "--lr", "1e-2", "-b", "32", "--epochs", "1"]
    weights = ["--model", "resnet18", "--weights", str(shared / "weights/resnet18.safetensors")]
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "wrong.csv"), "-o", str(run), *recipe, *weights]) == 0
    if split == "val":
        evaluation = read_run_evaluation(run, ("Cat", "Dog"))
        found = label_errors.find_in_records(evaluation.records, 2)
        ranked = [evaluation.paths[i] for i in found.order]
    else:
        assert main(["label-errors", str(run)]) == 0
        with (run / "label_errors.csv").open(newline="") as stream:
            ranked = [row["path"] for row in csv.DictReader(stream)]
    first = set(ranked[: len(ranked) // 10])
    print(f"{split}: {len(first & wrong)} of {len(wrong)} in the first {len(first)} of {len(ranked)}")
    assert len(first & wrong) >= 0.7 * len(wrong)
