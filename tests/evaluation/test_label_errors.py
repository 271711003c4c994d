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
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from export.predict import Preprocessing
from resnet_dist.cli.main import main
from resnet_dist.config.schema import ModelConfig
from resnet_dist.evaluation import confident_learning
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.report.on_disk import read_run_evaluation
from tests.conftest import WITH_REPORT, make_folder
from tests.report.pages import made_records


def brute_force(target: list[int], probabilities: list[list[float]]) -> tuple[list[int], list[float], float]:
    """The class that each image counts as, the quality of its label, and the number of wrong labels, as the paper words
    it, one image at a time."""
    classes = range(len(probabilities[0]))
    pairs = list(zip(target, probabilities, strict=True))
    thresholds = {}
    for j in classes:
        own = [p[j] for t, p in pairs if t == j]
        if own:
            thresholds[j] = sum(own) / len(own)
    counted, quality, joint = [], [], {(i, j): 0 for i in classes for j in classes}
    for t, p in pairs:
        above = [j for j in thresholds if p[j] >= thresholds[j]]
        counted.append(max(above, key=lambda j: p[j]) if above else t)
        if above:
            joint[t, counted[-1]] += 1
        quality.append((p[t] - max(p[j] for j in classes if j != t) + 1) / 2)
    estimated = 0.0
    for i in classes:
        row = sum(joint[i, j] for j in classes)
        estimated += sum(joint[i, j] / row * target.count(i) for j in classes if row and j != i)
    return counted, quality, estimated


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(n=st.integers(1, 30), classes=st.integers(2, 6), seed=st.integers(0, 10_000))
def test_ranking_equals_the_definition(n: int, classes: int, seed: int) -> None:
    """Also where a class has no images. Suspected is what is neither counted as its label nor predicted as it, the
    worst first, no more than there are by the estimate, and nothing where the judge cannot tell."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, classes, n)
    probabilities = generator.dirichlet(np.full(classes, 0.5), n)
    probabilities[: n * seed % 3, :] += (
        4 * np.eye(classes)[target[: n * seed % 3]]
    )  # in a part, the labels are predicted
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    wanted, quality, estimate = brute_force(target.tolist(), probabilities.tolist())
    counted, estimated = confident_learning.confident_joint(target, probabilities)
    # A mean in another order of addition may differ in its last digit, which decides at the very threshold.
    edge = {t: np.mean(probabilities[target == t, t]) for t in set(target.tolist())}
    clear = [all(abs(p[t] - value) > 1e-12 for t, value in edge.items()) for p in probabilities]
    assert [c for c, ok in zip(counted, clear, strict=True) if ok] == [
        c for c, ok in zip(wanted, clear, strict=True) if ok
    ]
    if all(clear):
        assert estimated == pytest.approx(estimate)
    found = confident_learning.find(target, probabilities)
    assert found.quality == pytest.approx(quality)
    assert found.judge.right == (probabilities.argmax(axis=1) == target).sum()
    candidates = [i for i in range(n) if counted[i] != target[i] and probabilities[i].argmax() != target[i]]
    worst = sorted(candidates, key=lambda i: found.quality[i])[: round(estimated)]
    assert set(np.flatnonzero(found.suspected)) == set(worst if found.judge.can_tell else [])
    order = found.order.tolist()
    assert sorted(order) == list(range(n))
    keys = [(not found.suspected[i], found.quality[i]) for i in order]
    assert keys == sorted(keys)


def judged(
    apart: float, seed: int, wrong: float, n: int = 400, classes: int = 4
) -> tuple[confident_learning.LabelErrors, np.ndarray]:
    """Label errors found in `n` points of normals of which a share has wrong labels, and bool (n,): which."""
    random = np.random.default_rng(seed)
    true = random.integers(0, classes, n)
    features = (random.normal(size=(n, 32)) + apart * np.eye(classes, 32)[true]).astype(np.float32)
    is_wrong = random.random(n) < wrong
    target = np.where(is_wrong, (true + random.integers(1, classes, n)) % classes, true)
    return confident_learning.find(target, confident_learning.out_of_fold(features, target, 5)), is_wrong


@pytest.mark.parametrize("apart", [2.5, 3.5, 5.0])
def test_strong_model_is_mostly_right_about_labels(apart: float) -> None:
    """Of 5 % wrong labels; and of none it suspects hardly any."""
    found = [judged(apart, seed, wrong=0.05) for seed in range(4)]
    told = [(errors, wrong) for errors, wrong in found if errors.judge.can_tell]
    assert told or apart < 3
    if told:
        suspected = sum(errors.suspected.sum() for errors, _ in told)
        hits = sum((errors.suspected & wrong).sum() for errors, wrong in told)
        print(f"{apart}: {len(told)} of 4 can tell; {hits} of {suspected} suspects are wrong labels")
        assert suspected > 0 and hits > 0.5 * suspected
    clean, _ = judged(apart, 9, wrong=0)
    assert clean.suspected.mean() < 0.02


def test_weak_model_cannot_judge_labels() -> None:
    """Where the paper's count alone would suspect a large part of the labels, all of which are right."""
    errors, _ = judged(apart=1.0, seed=0, wrong=0)
    assert errors.judge.right / 400 < 0.6 and not errors.suspected.any() and not errors.judge.can_tell
    said = errors.judge.sentence(0, "the network")
    assert said.startswith("Wrong labels cannot be identified: only ") and "predicted correctly by the network" in said


@pytest.mark.parametrize(
    ("right", "images", "chance", "can_tell"),
    [
        (14, 40, 0.25, False),  # 0.35 top-1
        (20, 20, 0.5, True),
        (10, 10, 0.5, False),  # ten images show too little: at least 0.74 of 0.80
        (950, 1000, 0.95, False),  # as good as always naming the largest class
        (850, 1000, 0.5, True),
        (790, 1000, 0.5, False),
        (640, 1000, 0.001, True),
    ],
)
def test_accuracy_needed_to_judge_labels(right: int, images: int, chance: float, can_tell: bool) -> None:
    judge = confident_learning.Judge(right, images, chance)
    low = binomtest(right, images, alternative="greater").proportion_ci(0.95, method="exact").low
    assert judge.low == pytest.approx(low) and judge.can_tell == can_tell == (low >= 0.4 * chance + 0.6)


def test_records_suffice_for_up_to_five_classes() -> None:
    """All probabilities are in the records then, so that nothing is lost."""
    records = made_records(np.arange(200) % 5, 5, right=0.8)
    full = np.empty((200, 5), np.float32)
    np.put_along_axis(full, records.classes, records.probabilities, axis=1)
    found, wanted = confident_learning.find_in_records(records, 5), confident_learning.find(records.target, full)
    assert np.array_equal(found.suspected, wanted.suspected) and np.array_equal(found.likely, wanted.likely)
    assert found.quality == pytest.approx(wanted.quality, abs=1e-6)
    assert 0 < found.suspected.sum() < 200


def test_label_outside_the_top_five_counts() -> None:
    """Its probability comes through the loss: the quality is the true one."""
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=(50, 20)) * 3)
    target = logits.argmin(dim=1)
    exact = logits.softmax(1).numpy()
    top = logits.softmax(1).topk(5)
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none").float().numpy()
    records = confident_learning.Records(target.numpy(), loss, top.indices.numpy(), top.values.float().numpy())
    found = confident_learning.find_in_records(records, 20)
    assert found.quality == pytest.approx(confident_learning.find(target.numpy(), exact).quality, abs=1e-6)


def test_out_of_fold_is_fitted_on_the_other_folds() -> None:
    """Equal to fitting each fold by hand; a label has no part in its own probabilities."""
    generator = np.random.default_rng(0)
    target = np.arange(60) % 3
    features = (generator.normal(size=(60, 8)) + 2 * np.eye(3, 8)[target]).astype(np.float32)
    found = confident_learning.out_of_fold(features, target, folds=4)
    wanted = np.zeros((60, 3))
    for fitted, judged in StratifiedKFold(4, shuffle=True, random_state=0).split(features, target):
        scaler = StandardScaler().fit(features[fitted])
        regression = LogisticRegression(C=confident_learning.REGULARISATION, max_iter=1000)
        regression.fit(scaler.transform(features[fitted]), target[fitted])
        wanted[judged] = regression.predict_proba(scaler.transform(features[judged]))
    assert found == pytest.approx(wanted)
    assert found.sum(axis=1) == pytest.approx(np.ones(60))


# The verb


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from random weights on 30 training images of each of two classes, three of them in the other's folder."""
    place = tmp_path_factory.mktemp("labels")
    data = make_folder(place / "data", train=30, val=3, classes=("cat", "dog"))
    for i in range(3):
        file = data / "train" / "cat" / f"train{i:03d}.png"
        shutil.move(file, data / "train" / "dog" / f"wrong{i}.png")
    assert main(["train", str(data), "-o", str(place / "run"), *WITH_REPORT, "--epochs", "1"]) == 0
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
    assert len(rows) == 60
    assert {row["path"] for row in rows[:3]} == {f"train/dog/wrong{i}.png" for i in range(3)}
    assert all((row["label"], row["likely"]) == ("dog", "cat") for row in rows[:3])
    suspected = [row["path"] for row in rows if row["suspected"] == "1"]
    assert suspected and all("wrong" in path for path in suspected)
    said = capsys.readouterr().out
    assert "wrong0.png: labelled dog, likely cat" in said
    assert said.startswith(f"{len(suspected)} labels are suspected. 57 of 60 labels (0.95) are predicted correctly by")
    assert main(["report", str(run), "--no-near-duplicates"]) == 0
    assert said.splitlines()[0] in (run / "report.html").read_text(), "the page says the same"


def test_weak_model_suspects_no_label(run: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of labels that the pictures say nothing about: in the file, on the terminal and on the page."""
    from resnet_dist.data.index import read_run_part
    from resnet_dist.evaluation.label_errors import judge

    table = read_run_part(run, "train", ("cat", "dog"))
    noise = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    ranking = judge(5, run, table, noise, ("cat", "dog"))
    assert ranking.sentence.startswith("Wrong labels cannot be identified") and ranking.suspects == []
    with (run / "label_errors.csv").open(newline="") as stream:
        assert {row["suspected"] for row in csv.DictReader(stream)} == {"0"}
    assert main(["report", str(run), "--no-near-duplicates"]) == 0
    assert ranking.sentence in (run / "report.html").read_text()


def test_runs_without_suitable_weights_cannot_judge_labels(
    run: Path, weights: Path, refused: Callable[..., str]
) -> None:
    said = refused(2, "label-errors", run)
    assert "--weights is missing" in said and "random weights" in said
    config, begun = run / "config.toml", (run / "config.toml").read_text()
    config.write_text(begun.replace("[run]\n", '[run]\ninit_from = "older"\n'))
    said = refused(2, "label-errors", run)
    config.write_text(begun)
    assert "started from the run older" in said and "random" not in said
    said = refused(2, "label-errors", run, "--weights", weights, "--folds", "28", "--workers", "0")
    assert "--folds 28: class 'cat' has 27 training images" in said
    assert "--folds 1: must be at least 2" in refused(2, "label-errors", run, "--folds", "1")
    assert "--weights none" in refused(2, "label-errors", run, "--weights", "none")


# Real photographs


def wrong_labels(data: Path, file: Path, share: float = 0.05) -> dict[str, set[str]]:
    """A manifest of cats and dogs in which that share of each split's labels is wrong; gives the paths of those."""
    clean = file.with_name("clean.csv")
    assert main(["split", str(data), str(clean)]) == 0
    with clean.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    wrong = {}
    for split in ("train", "val"):
        part = [row for row in rows if row["split"] == split]
        chosen = np.random.default_rng(0).choice(len(part), round(share * len(part)), replace=False)
        for i in chosen:
            part[i]["label"] = {"Cat": "Dog", "Dog": "Cat"}[part[i]["label"]]
        wrong[split] = {part[i]["path"] for i in chosen}
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return wrong


@pytest.mark.matrix
def test_wrong_labels_among_photographs(shared: Path, tmp_path: Path) -> None:
    """Of 5 % wrong labels at least 70 % are in the first tenth: of the network's rank, and of the one out of fold.

    They hardly harm the network: by the right labels it is right on more than nine tenths.
    """
    wrong = wrong_labels(shared / "cats_dogs", tmp_path / "wrong.csv")
    recipe = ["--recipe", "feature-extractor-bn-eval", "-b", "32", "--epochs", "5"]
    recipe += ["--img-size", "112", "--resize", "128", "--aug", "none"]  # from kept features
    weights = ["--model", "resnet18", "--weights", str(shared / "weights/resnet18.safetensors")]
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "wrong.csv"), "-o", str(run), *recipe, *weights, "--no-report"]) == 0
    evaluation = read_run_evaluation(run, ("Cat", "Dog"), Preprocessing())
    is_wrong = [path in wrong["val"] for path in evaluation.paths]
    assert np.mean((evaluation.records.prediction == evaluation.records.target) != is_wrong) >= 0.9
    found = confident_learning.find_in_records(evaluation.records, 2)
    ranked = {"val": [evaluation.paths[i] for i in found.order]}
    assert main(["label-errors", str(run)]) == 0
    with (run / "label_errors.csv").open(newline="") as stream:
        ranked["train"] = [row["path"] for row in csv.DictReader(stream)]
    for split, paths in ranked.items():
        first = set(paths[: len(paths) // 10])
        print(f"{split}: {len(first & wrong[split])} of {len(wrong[split])} in the first {len(first)} of {len(paths)}")
        assert len(first & wrong[split]) >= 0.7 * len(wrong[split])
