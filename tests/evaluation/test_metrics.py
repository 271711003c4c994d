"""Metrics of records against scikit-learn on whole probability tables."""

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)

from resnet_dist.evaluation.metrics import _resampled, confused_pairs, confusion, headline, measured, per_class
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.reliability import reliability

CLASSES = [f"class {i}" for i in range(7)]


def records_of(probabilities: np.ndarray, target: np.ndarray, k: int = 5) -> Records:
    order = np.argsort(-probabilities, axis=1)[:, :k]
    loss = -np.log(probabilities[np.arange(len(target)), target])
    return Records(
        target, loss.astype(np.float32), order, np.take_along_axis(probabilities, order, 1).astype(np.float32)
    )


@pytest.fixture(scope="module")
def table() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (200, 7) and targets, of which class 3 has none."""
    random = np.random.default_rng(0)
    target = random.choice([0, 1, 2, 4, 5, 6], 200, p=[0.4, 0.2, 0.1, 0.1, 0.15, 0.05])
    logits = random.normal(size=(200, 7)) + 1.5 * np.eye(7)[target]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), target


def test_headline_equals_scikit_learn(table: tuple[np.ndarray, np.ndarray]) -> None:
    probabilities, target = table
    predicted = probabilities.argmax(1)
    found = headline(records_of(probabilities, target))
    report = classification_report(target, predicted, labels=np.unique(target), output_dict=True, zero_division=0)
    assert found["top1"] == pytest.approx(accuracy_score(target, predicted))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(target, probabilities, k=5, labels=range(7)))
    assert found["loss"] == pytest.approx(log_loss(target, probabilities, labels=range(7)), rel=1e-6)
    assert found["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])


def test_per_class_equals_scikit_learn_with_absent_classes(table: tuple[np.ndarray, np.ndarray]) -> None:
    probabilities, target = table
    report = classification_report(
        target, probabilities.argmax(1), labels=range(7), target_names=CLASSES, output_dict=True, zero_division=0
    )
    for row in per_class(records_of(probabilities, target), CLASSES):
        expected = report[row["class"]]
        assert row["images"] == expected["support"]
        values = [expected[name] for name in ("precision", "recall", "f1-score")]
        assert [row["precision"], row["recall"], row["f1"]] == (values if row["images"] else [None] * 3)


def test_confusion_equals_scikit_learn(table: tuple[np.ndarray, np.ndarray]) -> None:
    probabilities, target = table
    expected = confusion_matrix(target, probabilities.argmax(1), labels=range(7))
    assert np.array_equal(confusion(records_of(probabilities, target), CLASSES), expected)


def test_top5_with_fewer_than_five_classes(table: tuple[np.ndarray, np.ndarray]) -> None:
    """Of two classes the target is always among the best two."""
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    found = headline(records_of(probabilities, np.array([1, 1]), k=2))
    assert (found["top1"], found["top5"]) == (0.5, 1.0)


def test_confused_pairs_equal_counting(table: tuple[np.ndarray, np.ndarray]) -> None:
    probabilities, target = table
    predicted = probabilities.argmax(1)
    found = confused_pairs(confusion(records_of(probabilities, target), CLASSES), CLASSES)
    assert sum(pair["images"] for pair in found) == (target != predicted).sum()
    assert [pair["images"] for pair in found] == sorted((pair["images"] for pair in found), reverse=True)
    for pair in found:
        t, p = CLASSES.index(pair["target"]), CLASSES.index(pair["prediction"])
        count = sum((a, b) == (t, p) for a, b in zip(target, predicted, strict=True))
        assert t != p and pair["images"] == count
        assert pair["share_of_target"] == pytest.approx(count / (target == t).sum())
    assert confused_pairs(np.diag([3, 4]), ["a", "b"]) == []


def test_bootstrap_statistics_equal_those_of_repeated_images(table: tuple[np.ndarray, np.ndarray]) -> None:
    """Counting an image twice is the same as having it twice; classes that were not drawn do not count."""
    probabilities, target = table
    records, random = records_of(probabilities, target), np.random.default_rng(7)
    for _ in range(5):
        drawn = random.integers(0, 200, 200)
        drawn = drawn[target[drawn] != 2]
        loss, f1, ece = _resampled(records)(np.bincount(drawn, minlength=200))
        again = records_of(probabilities[drawn], target[drawn])
        predicted, present = probabilities[drawn].argmax(1), np.unique(target[drawn])
        assert loss == pytest.approx(again.loss.mean())
        expected = f1_score(target[drawn], predicted, labels=present, average="macro", zero_division=0)
        assert f1 == pytest.approx(expected) and 2 not in present
        assert ece == pytest.approx(reliability(again).error, abs=1e-6)


def draw(n: int, sharpness: float, random: np.random.Generator) -> Records:
    """Five classes; the model is perfectly calibrated where `sharpness` is 1."""
    target = random.integers(0, 5, n)
    logits = sharpness * 1.5 * (random.normal(size=(n, 5)) + 1.5 * np.eye(5)[target])
    table = np.exp(logits - logits.max(1, keepdims=True))
    return records_of(table / table.sum(1, keepdims=True), target)


@pytest.mark.parametrize("sharpness", [1.0, 1.4])
def test_intervals_cover_the_true_value(sharpness: float) -> None:
    """Of 120 sets of 150 images; the interval of the ece is wide by design, the others are 95 %."""
    random = np.random.default_rng(1)
    whole = draw(300_000, sharpness, random)
    truth = {**headline(whole), "ece": reliability(whole).error}
    found = [measured(draw(150, sharpness, random)) for _ in range(120)]
    for name in ("loss", "top1", "macro_f1", "ece"):
        inside = np.mean([part[name].low <= truth[name] <= part[name].high for part in found])
        assert 0.9 <= inside <= 1, name
        assert name == "ece" or inside < 0.995, f"{name}: too wide"
    assert all(part[name].low <= part[name].value <= part[name].high for part in found for name in part)


def test_intervals_include_mistakes_not_in_the_sample() -> None:
    found = measured(records_of(np.array([[0.9, 0.1], [0.2, 0.8]] * 10), np.array([0, 1] * 10), k=2))
    assert found["macro_f1"].value == 1 and found["macro_f1"].low == found["top1"].low < 0.9
    assert found["ece"].high > found["ece"].value + 0.1
    assert str(found["top1"]) == "1.0000 [0.8389, 1.0000]"
