"""Calibration against brute force and scipy, and calibration.json against what can happen to it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from resnet_dist.errors import ArtifactError
from resnet_dist.evaluate.calibrate import (
    Calibration,
    abstained,
    bins_of,
    calibrate,
    fit_temperature,
    read_calibration,
    reliability,
    tempered,
    thresholds,
    write_calibration,
)
from resnet_dist.evaluate.records import Records
from resnet_dist.model.weights import sha256_of

CLASSES = ("ant", "bee", "cow", "dog")


def records_of(logits: np.ndarray, target: np.ndarray) -> Records:
    order = np.argsort(-logits, axis=1, kind="stable")
    table = softmax(logits, axis=1)
    loss = -log_softmax(logits, axis=1)[np.arange(len(target)), target]
    best = np.take_along_axis(table, order, 1).astype(np.float32)
    return Records(target, loss.astype(np.float32), order, best, logits.astype(np.float32))


def world(n: int, sharpness: float, seed: int = 0) -> Records:
    """Records of 4 classes whose logits are `sharpness` times those of a perfectly calibrated model."""
    random = np.random.default_rng(seed)
    target = random.integers(0, 4, n)
    # Of normals with means 1.5 e_y and variance 1, the posterior's logits are 1.5 times the values.
    return records_of(sharpness * 1.5 * (random.normal(size=(n, 4)) + 1.5 * np.eye(4)[target]), target)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_calibration_error_equals_brute_force(sharpness: float) -> None:
    records = world(300, sharpness)
    error, counts = 0.0, []
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [i for i in range(300) if low < records.probabilities[i, 0] <= high]
        counts.append(len(inside))
        if inside:
            right = sum(records.prediction[i] == records.target[i] for i in inside) / len(inside)
            sure = sum(float(records.probabilities[i, 0]) for i in inside) / len(inside)
            error += abs(right - sure) * len(inside) / 300
    found = reliability(records)
    assert found.error == pytest.approx(error, abs=1e-9)
    assert found.images.tolist() == counts and np.isnan(found.accuracy[0])


def test_bins_are_open_below_and_closed_above() -> None:
    edges = np.arange(1, 16) / 15
    assert bins_of(edges).tolist() == list(range(15))
    assert bins_of(np.nextafter(edges, 2)).tolist() == [*range(1, 15), 14]


def test_a_calibrated_world_has_little_error_and_a_sharp_one_much() -> None:
    assert reliability(world(40_000, 1.0)).error < 0.01
    assert reliability(world(40_000, 3.0)).error > 0.1


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_temperature_is_the_likeliest_and_never_changes_the_best_class(sharpness: float) -> None:
    records = world(500, sharpness)
    logits = records.logits
    assert logits is not None

    def loss(temperature: float) -> float:
        logs = log_softmax(logits.astype(np.float64) / temperature, axis=1)
        return float(-logs[np.arange(500), records.target].mean())

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-8})
    found = fit_temperature(logits, records.target)
    assert found is not None and found == pytest.approx(best.x, rel=1e-4)
    better = tempered(records, found)
    assert better.loss.mean() < records.loss.mean() and better.loss.mean() == pytest.approx(loss(found), rel=1e-5)
    assert np.array_equal(better.classes, records.classes)
    expected = np.sort(softmax(logits / found, axis=1), axis=1)[:, ::-1]
    assert better.probabilities == pytest.approx(expected, abs=1e-6)


def test_temperature_recovers_how_much_too_sharp_a_world_is() -> None:
    records = world(20_000, 2.5)
    assert records.logits is not None
    assert fit_temperature(records.logits, records.target) == pytest.approx(2.5, rel=0.05)


def test_without_a_mistake_no_temperature_is_likeliest() -> None:
    logits = np.eye(4)[[0, 1, 2, 3]] * 2
    assert fit_temperature(logits, np.arange(4)) is None
    _, made = calibrate(records_of(logits, np.arange(4)), CLASSES, None, "0" * 64)
    assert made.temperature == 1 and "every image is right" in made.measured["note"]


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.95, 1.0])
def test_thresholds_are_the_smallest_that_reach_the_precision(precision: float) -> None:
    """Against every possible cut, of confidences with many ties."""
    records = world(200, 1.0, seed=5)
    rounded = Records(records.target, records.loss, records.classes, records.probabilities.round(1))
    for number, found in enumerate(thresholds(rounded, 4, precision)):
        mine = rounded.prediction == number
        sure, right = rounded.probabilities[mine, 0], (rounded.target == number)[mine]
        cuts = [cut for cut in np.unique(sure) if right[sure >= cut].mean() >= precision]
        assert found.images == mine.sum()
        if not cuts:
            assert found.threshold is None and found.kept == 0
            continue
        assert found.threshold is not None
        kept = sure >= found.threshold
        assert np.array_equal(kept, sure >= min(cuts))
        assert (found.kept, found.right) == (kept.sum(), right[kept].sum()) and right[kept].mean() >= precision


def test_a_class_that_cannot_be_precise_is_never_believed() -> None:
    """Class 0 is always wrong, 1 always right, 2 never predicted, 3 right only when it is sure."""
    prediction = np.array([0, 0, 1, 1, 3, 3])
    target = np.array([1, 2, 1, 1, 2, 3])
    sure = np.array([0.9, 0.8, 0.3, 0.4, 0.5, 0.7], np.float32)
    records = Records(target, np.zeros(6, np.float32), prediction[:, None], sure[:, None])
    limits = [found.threshold for found in thresholds(records, 4, 0.95)]
    assert limits == [None, 0.0, None, pytest.approx(0.6)]
    assert abstained(records, limits).tolist() == [True, True, False, False, True, False]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "best.safetensors"
    file.write_bytes(b"weights")
    return file


def test_calibration_file_is_read_as_it_was_written(checkpoint: Path) -> None:
    assert read_calibration(checkpoint, 4) is None
    _, made = calibrate(world(100, 2.0), CLASSES, 0.8, sha256_of(checkpoint))
    file = write_calibration(checkpoint, made)
    assert file == checkpoint.parent / "calibration.json" and checkpoint.read_bytes() == b"weights"
    found = read_calibration(checkpoint, 4)
    assert found is not None and isinstance(found, Calibration)
    assert (found.temperature, found.thresholds) == (made.temperature, made.thresholds)
    row = found.measured["classes"][1]
    assert row["class"] == "bee" and row["precision"] == row["right"] / row["kept"]
    assert found.measured["loss"][1] < found.measured["loss"][0]


def test_calibration_of_another_checkpoint_is_refused(checkpoint: Path) -> None:
    _, made = calibrate(world(100, 2.0), CLASSES, None, sha256_of(checkpoint))
    write_calibration(checkpoint, made)
    checkpoint.write_bytes(b"other weights")
    with pytest.raises(ArtifactError, match="made for another checkpoint"):
        read_calibration(checkpoint, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values | {"temperature": 0.0},
        lambda values: values | {"temperature": "1"},
        lambda values: values | {"thresholds": [0.5]},
        lambda values: values | {"thresholds": [0.5, 2.0, None, None]},
        lambda values: values | {"thresholds": 3},
        lambda values: values | {"format_version": 2},
        lambda values: values | {"more": 1},
        lambda values: {name: value for name, value in values.items() if name != "measured"},
        lambda values: [values],
    ],
)
def test_damaged_calibration_files_are_refused(checkpoint: Path, change: Callable[[object], object]) -> None:
    _, made = calibrate(world(100, 2.0), CLASSES, 0.8, sha256_of(checkpoint))
    file = write_calibration(checkpoint, made)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ArtifactError, match=r"calibration.json: damaged"):
        read_calibration(checkpoint, 4)
