"""Calibration: the temperature that corrects a model's probabilities, and when to abstain."""

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
    """The temperature that makes softmax(logits / T) most likely (Guo et al. 2017), in 0.05..20.

    logits: float (n, classes); target: int64 (n,). The mean loss is convex in 1 / T, so its slope is brought to zero by
    bisection, in float64. None if every image is classified correctly: the best T would then be 0, absolute certainty.
    """
    assert logits is not None
    if (logits.argmax(axis=1) == target).all():
        return None
    values = torch.from_numpy(logits).double()
    own = values[torch.arange(len(target)), torch.from_numpy(target)]
    low, high = (float(np.log(t)) for t in TEMPERATURES)
    for _ in range(40):
        middle = (low + high) / 2
        expected = ((values / np.exp(middle)).softmax(1) * values).sum(1)
        too_sharp = bool((expected - own).mean() > 0)  # the slope of the loss in 1 / T
        low, high = (middle, high) if too_sharp else (low, middle)
    return float(np.exp((low + high) / 2))


def tempered(records: Records, temperature: float) -> Records:
    """The records of logits divided by `temperature`: other losses and probabilities, the same classes."""
    assert records.logits is not None
    logs = (torch.from_numpy(records.logits) / temperature).log_softmax(1).numpy()
    loss = -logs[np.arange(len(records)), records.target]
    probabilities = np.exp(np.take_along_axis(logs, records.classes, axis=1))
    return Records(records.target, loss, records.classes, probabilities, records.logits, records.features)


# Cross-fitting


def cross_fitted(records: Records, num_classes: int, precision: float | None = None) -> tuple[Records, np.ndarray]:
    """The effect of calibrating on images that it was not fitted on, estimated by cross-fitting.

    Each image of `records`, which must hold logits, is judged by a temperature, and with a `precision` by thresholds,
    that were fitted on the other folds. Returns the tempered records and bool (n,): which predictions are kept.
    The folds are the same in every call.
    """
    assert records.logits is not None
    fold = np.random.default_rng(0).permutation(len(records)) % FOLDS
    loss, probabilities = np.empty_like(records.loss), np.empty_like(records.probabilities)
    kept = np.ones(len(records), bool)
    for number in range(min(FOLDS, len(records))):
        judged = fold == number
        others = taken(records, ~judged)
        temperature = fit_temperature(others.logits, others.target) or 1.0
        part = tempered(taken(records, judged), temperature)
        loss[judged], probabilities[judged] = part.loss, part.probabilities
        if precision is not None:
            limits = thresholds(tempered(others, temperature), num_classes, precision)
            kept[judged] = ~abstained(part, [limit.threshold for limit in limits])
    return replace(records, loss=loss, probabilities=probabilities), kept


def taken(records: Records, rows: np.ndarray) -> Records:
    """Some of the records, by a mask or by positions."""
    extras = (None if values is None else values[rows] for values in (records.logits, records.features))
    return Records(
        records.target[rows], records.loss[rows], records.classes[rows], records.probabilities[rows], *extras
    )


# calibration.json


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Temperature and thresholds that were fitted on validation images for a checkpoint, which does not change.

    Attributes:
        checkpoint_sha256: of the file that this belongs to.
        temperature: the logits are divided by it.
        thresholds: the confidence threshold of every class, None if predict must always abstain from it; empty if
            there are none.
        measured: what it was fitted on and what it changes, for people to read.
    """

    checkpoint_sha256: str
    temperature: float
    thresholds: tuple[float | None, ...]
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class Calibrated:
    """The result of calibrating.

    Attributes:
        records: those of the evaluation, with the fitted temperature applied.
        judged: the same with probabilities and losses that are cross-fitted, from which metrics are to be computed.
    """

    calibration: Calibration
    records: Records
    judged: Records


def calibrate(records: Records, classes: Sequence[str], precision: float | None, checkpoint_sha256: str) -> Calibrated:
    """Fit a temperature, and thresholds if a precision is given, on evaluated images. The records must hold logits.

    `precision`, above 0 and below 1: the precision that each class's threshold must reach; None for no thresholds.
    Every number in `measured` about the calibrated model is cross-fitted; those of a class's threshold come with the
    lower bound by which it was chosen. Raises DataError if no class has enough images to show the precision.
    """
    assert records.logits is not None
    fitted = fit_temperature(records.logits, records.target)
    plain, better = tempered(records, 1.0), tempered(records, fitted or 1.0)
    judged, kept = cross_fitted(records, len(classes), precision)
    measured: dict[str, Any] = {"images": len(records), "folds": min(FOLDS, len(records))}
    if fitted is None:
        measured["note"] = "every image is classified correctly, so no temperature fits best: 1 is kept"
    measured["loss"] = [float(part.loss.mean(dtype=np.float64)) for part in (plain, judged)]
    measured["ece"] = [reliability(part).error for part in (plain, judged)]
    limits: list[Threshold] = []
    if precision is not None:
        limits = thresholds(better, len(classes), precision)
        _check_enough(limits, precision)
        rows = [{"class": name, **limit.to_dict()} for name, limit in zip(classes, limits, strict=True)]
        measured |= {"precision": precision, "confidence": CONFIDENCE, "fewest_images": fewest(precision)}
        measured |= {"cross_fitted": _kept(judged, kept), "classes": rows}
    made = Calibration(
        checkpoint_sha256=checkpoint_sha256,
        temperature=fitted or 1.0,
        thresholds=tuple(limit.threshold for limit in limits),
        measured=measured,
    )
    return Calibrated(made, better, judged)


def _check_enough(limits: Sequence[Threshold], precision: float) -> None:
    most, needed = max(limit.images for limit in limits), fewest(precision)
    if most < needed:
        raise DataError(
            f"--precision {precision:g}: at least {needed} images must be predicted as a class to show it with "
            f"{100 * CONFIDENCE:g} % confidence, and the most are {most}; give more images as DATA, or lower it"
        )


def _kept(records: Records, kept: np.ndarray) -> dict[str, Any]:
    """How many predictions are kept, how many of those are right, and their precision with its 95 % interval."""
    n, right = int(kept.sum()), int((records.prediction == records.target)[kept].sum())
    interval = list(wilson(right, n)) if n else None
    return {"kept": n, "right": right, "precision": right / n if n else None, "precision_interval": interval}


is_calibration = json_with("format_version", "checkpoint_sha256", "temperature")


def write_calibration(checkpoint: Path, calibration: Calibration) -> Path:
    """Write calibration.json beside the checkpoint. Raises MachineError."""
    file = checkpoint.with_name(FILE_NAME)
    write_atomically(file, to_json({"format_version": FORMAT_VERSION, **asdict(calibration)}))
    return file


def read_calibration(checkpoint: Path, num_classes: int) -> Calibration | None:
    """The calibration of a checkpoint, or None where it has none.

    Raises ArtifactError if calibration.json is damaged, or was made for another checkpoint.
    """
    file = checkpoint.with_name(FILE_NAME)
    if not file.exists():
        return None
    try:
        found = _parsed(parse_json(read_bounded(file, MAX_BYTES)), num_classes)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file}: damaged ({error}); make it again with eval --calibrate, or remove it") from None
    if found.checkpoint_sha256 != sha256_of(checkpoint):
        raise ArtifactError(
            f"{file}: made for another checkpoint than {checkpoint.name}; make it again with eval --calibrate, "
            "or remove it"
        )
    return found


def _parsed(values: Any, num_classes: int) -> Calibration:
    if not isinstance(values, dict) or values.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError("unknown format_version")
    made = Calibration(**{**values, "thresholds": tuple(values["thresholds"])})
    if not isinstance(made.temperature, float) or not TEMPERATURES[0] <= made.temperature <= TEMPERATURES[1]:
        raise ValueError(f"temperature {made.temperature!r}")
    fits = all(limit is None or (isinstance(limit, float) and 0 <= limit <= 1) for limit in made.thresholds)
    if not fits or len(made.thresholds) not in (0, num_classes):
        raise ValueError("its thresholds do not fit the classes")
    return made
