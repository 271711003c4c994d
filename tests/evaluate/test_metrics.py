"""Metrics of records against scikit-learn on whole probability tables."""

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    log_loss,
    top_k_accuracy_score,
)

from resnet_dist.evaluate.metrics import confusion, headline, per_class
from resnet_dist.evaluate.records import Records

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


def test_per_class_equals_scikit_learn_and_knows_absent_classes(table: tuple[np.ndarray, np.ndarray]) -> None:
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
