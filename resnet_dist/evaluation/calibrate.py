"""Calibration: a temperature that corrects the probabilities, and confidence thresholds for abstaining."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet_dist.errors import ArtifactError, DataError
from resnet_dist.evaluation.intervals import wilson
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.reliability import reliability
from resnet_dist.evaluation.thresholds import CONFIDENCE, Threshold, abstained, fewest, thresholds
from resnet_dist.files.outputs import json_with
from resnet_dist.files.reading import parse_json, read_bounded
from resnet_dist.files.run import to_json, write_atomically
from resnet_dist.model.weights import sha256_of

FOLDS = 5  # of cross-fitting
TEMPERATURES = (0.05, 20.0)
FILE_NAME, FORMAT_VERSION, MAX_BYTES = "calibration.json", 1, 1 << 26


# Temperature


def fit_temperature(logits: np.ndarray | None, target: np.ndarray) -> float | None:
    """The temperature T in 0.05..20 that minimises the loss of softmax(logits / T) (Guo et al. 2017).

    logits: float (n, classes); target: int64 (n,). The mean loss is convex in 1 / T, so bisection in float64 finds
    the zero of its slope. Returns None if every image is classified correctly, because the best T would then be 0.
    """
    assert logits is not None
    if (logits.argmax(axis=1) == target).all():
        return None
    values = torch.from_numpy(logits).double()
    of_target = values[torch.arange(len(target)), torch.from_numpy(target)]
    low, high = (float(np.log(t)) for t in TEMPERATURES)
    for _ in range(40):
        middle = (low + high) / 2
        expected = ((values / np.exp(middle)).softmax(1) * values).sum(1)
        too_sharp = bool((expected - of_target).mean() > 0)  # the slope of the loss in 1 / T
        low, high = (middle, high) if too_sharp else (low, middle)
    return float(np.exp((low + high) / 2))


def tempered(records: Records, temperature: float) -> Records:
    """The records with losses and probabilities of the logits divided by `temperature`; the classes are the same."""
    assert records.logits is not None
    logs = (torch.from_numpy(records.logits) / temperature).log_softmax(1).numpy()
    loss = -logs[np.arange(len(records)), records.target]
    probabilities = np.exp(np.take_along_axis(logs, records.classes, axis=1))
    return Records(records.target, loss, records.classes, probabilities, records.logits, records.features)


# Cross-fitting


def cross_fitted(records: Records, num_classes: int, precision: float | None = None) -> tuple[Records, np.ndarray]:
    """Estimate the effect of calibration on new images by cross-fitting. `records` must hold logits.

    Each image gets the temperature (and with `precision` the thresholds) that were fitted on the other folds. Returns
    the records with these temperatures, and bool (n,): which predictions reach their threshold. The folds are the same
    in every call.
    """
    assert records.logits is not None
    fold = np.random.default_rng(0).permutation(len(records)) % FOLDS
    loss, probabilities = np.empty_like(records.loss), np.empty_like(records.probabilities)
    kept = np.ones(len(records), bool)
    for number in range(min(FOLDS, len(records))):
        judged = fold == number
        others = select(records, ~judged)
        fitted = fit_temperature(others.logits, others.target)
        temperature = 1.0 if fitted is None else fitted
        part = tempered(select(records, judged), temperature)
        loss[judged], probabilities[judged] = part.loss, part.probabilities
        if precision is not None:
            limits = thresholds(tempered(others, temperature), num_classes, precision)
            kept[judged] = ~abstained(part, [limit.threshold for limit in limits])
    return replace(records, loss=loss, probabilities=probabilities), kept


def select(records: Records, rows: np.ndarray) -> Records:
    """The records of some rows, given by a mask or by positions."""
    extras = (None if values is None else values[rows] for values in (records.logits, records.features))
    return Records(
        records.target[rows], records.loss[rows], records.classes[rows], records.probabilities[rows], *extras
    )


# calibration.json


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Temperature and thresholds for a checkpoint, fitted on validation images. The checkpoint is not changed.

    Attributes:
        checkpoint_sha256: the hash of the checkpoint.
        temperature: the divisor of the logits.
        thresholds: the confidence threshold of every class, or None if predict never predicts the class; empty without
            thresholds.
        measured: information for readers: the images it was fitted on, and its effect.
    """

    checkpoint_sha256: str
    temperature: float
    thresholds: tuple[float | None, ...]
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class Calibrated:
    """The result of calibrating.

    Attributes:
        records: the records of the evaluation with the fitted temperature.
        judged: the same with cross-fitted probabilities and losses. Metrics must be computed from these.
    """

    calibration: Calibration
    records: Records
    judged: Records


def calibrate(records: Records, classes: Sequence[str], precision: float | None, checkpoint_sha256: str) -> Calibrated:
    """Fit a temperature, and thresholds if `precision` is given, on evaluated images. The records must hold logits.

    `precision`, above 0 and below 1: the precision that each class's threshold must reach; None for no thresholds.
    In `measured`, all numbers about the calibrated model are cross-fitted, except the precision of each threshold,
    which has its lower bound. Raises DataError if no class has enough images to prove the precision.
    """
    assert records.logits is not None
    fitted = fit_temperature(records.logits, records.target)
    temperature = 1.0 if fitted is None else fitted
    plain, better = tempered(records, 1.0), tempered(records, temperature)
    judged, kept = cross_fitted(records, len(classes), precision)
    measured: dict[str, Any] = {"images": len(records), "folds": min(FOLDS, len(records))}
    if fitted is None:
        measured["note"] = "every image is classified correctly, so there is no best temperature; it stays 1"
    elif min(abs(np.log(temperature / bound)) for bound in TEMPERATURES) < 0.01:
        low, high = TEMPERATURES
        measured["note"] = f"the best temperature is not within {low:g} to {high:g}; more images or training may help"
    measured["loss"] = [float(part.loss.mean(dtype=np.float64)) for part in (plain, judged)]
    measured["ece"] = [reliability(part).error for part in (plain, judged)]
    limits: list[Threshold] = []
    if precision is not None:
        limits = thresholds(better, len(classes), precision)
        _check_enough(limits, precision)
        rows = [{"class": name, **limit.to_dict()} for name, limit in zip(classes, limits, strict=True)]
        measured |= {"precision": precision, "confidence": CONFIDENCE, "fewest_images": fewest(precision)}
        measured |= {"cross_fitted": _kept(judged, kept), "classes": rows}
    calibration = Calibration(
        checkpoint_sha256=checkpoint_sha256,
        temperature=temperature,
        thresholds=tuple(limit.threshold for limit in limits),
        measured=measured,
    )
    return Calibrated(calibration, better, judged)


def _check_enough(limits: Sequence[Threshold], precision: float) -> None:
    most, needed = max(limit.images for limit in limits), fewest(precision)
    if most < needed:
        raise DataError(
            f"--precision {precision:g}: a class needs at least {needed} predicted images to prove this precision with "
            f"{100 * CONFIDENCE:g} % confidence, but the most are {most}; give more images as DATA, or lower it"
        )


def _kept(records: Records, kept: np.ndarray) -> dict[str, Any]:
    """The number of kept predictions, how many of them are right, and their precision with its 95 % interval."""
    n, right = int(kept.sum()), int((records.prediction == records.target)[kept].sum())
    interval = list(wilson(right, n)) if n else None
    return {"kept": n, "right": right, "precision": right / n if n else None, "precision_interval": interval}


is_calibration = json_with("format_version", "checkpoint_sha256", "temperature")


def write_calibration(checkpoint: Path, calibration: Calibration) -> Path:
    """Write calibration.json next to the checkpoint. Raises MachineError."""
    file = checkpoint.with_name(FILE_NAME)
    write_atomically(file, to_json({"format_version": FORMAT_VERSION, **asdict(calibration)}))
    return file


def read_calibration(checkpoint: Path, num_classes: int) -> Calibration | None:
    """Read the calibration of a checkpoint; None if it has none.

    Raises ArtifactError if calibration.json is damaged or belongs to another checkpoint.
    """
    file = checkpoint.with_name(FILE_NAME)
    if not file.exists():
        return None
    try:
        calibration = _parsed(parse_json(read_bounded(file, MAX_BYTES)), num_classes)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file}: damaged ({error}); create it again with eval --calibrate, or remove it") from None
    if calibration.checkpoint_sha256 != sha256_of(checkpoint):
        raise ArtifactError(
            f"{file}: it does not belong to {checkpoint.name}; create it again with eval --calibrate, or remove it"
        )
    return calibration


def _parsed(values: Any, num_classes: int) -> Calibration:
    if not isinstance(values, dict) or values.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError("unknown format_version")
    calibration = Calibration(**{**values, "thresholds": tuple(values["thresholds"])})
    if (
        not isinstance(calibration.temperature, float)
        or not TEMPERATURES[0] <= calibration.temperature <= TEMPERATURES[1]
    ):
        raise ValueError(f"temperature {calibration.temperature!r}")
    fits = all(limit is None or (isinstance(limit, float) and 0 <= limit <= 1) for limit in calibration.thresholds)
    if not fits or len(calibration.thresholds) not in (0, num_classes):
        raise ValueError("thresholds must be one number in 0..1 or null per class")
    return calibration
