"""Metrics from records in numpy. The tests compare them with scikit-learn, which takes seconds to import."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resnet_dist.evaluation.intervals import RESAMPLES, bootstrap, wilson
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.reliability import BINS, bins_of, reliability


@dataclass(frozen=True)
class Measured:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def headline(records: Records) -> dict[str, float]:
    """loss (mean cross-entropy, nats), top1, top5 and macro_f1, the last three in 0..1.

    top5 counts an image if its target is among the min(5, classes) best. macro_f1 is the mean over the classes that
    have images, because a class without images has no recall.
    """
    present = np.unique(records.target)
    right, taken, true = _class_counts(records, int(max(present[-1], records.prediction.max())) + 1)
    f1 = 2 * right[present] / (taken + true)[present]
    return {
        "loss": float(records.loss.mean(dtype=np.float64)),
        "top1": float((records.prediction == records.target).mean()),
        "top5": float((records.classes == records.target[:, None]).any(axis=1).mean()),
        "macro_f1": float(f1.mean()),
    }


def _class_counts(records: Records, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every class, int64 (classes,): correct predictions, all predictions of the class, and its images."""
    right = records.target[records.prediction == records.target]
    right, taken, true = (np.bincount(c, minlength=classes) for c in (right, records.prediction, records.target))
    return right, taken, true


def measured(records: Records) -> dict[str, Measured]:
    """The headline and the expected calibration error `ece` (0..1), each with its 95 % interval.

    Accuracies have Wilson's interval, loss and macro_f1 the bootstrap's over images. The ece of few images is biased
    upwards, and that of resamples even more, so bootstrap percentiles never cover a perfectly calibrated model.
    Therefore the upper distance is used on both sides, and the lower end is reduced by the ece that such a model shows
    by chance. A bootstrap also ignores mistakes that a small set does not contain. Therefore the intervals of macro_f1
    and ece extend to the bad side at least as far as that of top1.
    """
    values = {**headline(records), "ece": reliability(records).error}
    n = len(records)
    (loss, f1, _), (worst_loss, best_f1, worst_ece) = bootstrap(_resampled(records), n).tolist()
    top1, top5 = (wilson(round(values[name] * n), n) for name in ("top1", "top5"))
    unseen = values["top1"] - top1[0]
    surplus = min(values["ece"] - chance_error(records), 2 * values["ece"] - worst_ece)
    intervals = {
        "loss": (loss, worst_loss),
        "top1": top1,
        "top5": top5,
        "macro_f1": (max(0.0, min(f1, values["macro_f1"] - unseen)), best_f1),
        "ece": (max(0.0, surplus), min(1.0, max(worst_ece, values["ece"] + unseen))),
    }
    return {name: Measured(value, *intervals[name]) for name, value in values.items()}


def chance_error(records: Records) -> float:
    """The 97.5 % point of the calibration error of a perfectly calibrated model with these confidences, in 0..1.

    It is found by consistency resampling (Broecker and Smith 2007).
    """
    confidence, random = records.probabilities[:, 0].astype(np.float64), np.random.default_rng(0)
    bins, n = bins_of(confidence), len(records)
    gaps = ((random.random(n) < confidence) - confidence for _ in range(RESAMPLES))
    return float(np.quantile([np.abs(np.bincount(bins, gap, BINS)).sum() / n for gap in gaps], 0.975))


def _resampled(records: Records) -> Callable[[np.ndarray], np.ndarray]:
    """A function from the number of times that each image is drawn to loss, macro_f1 and ece."""
    loss = records.loss.astype(np.float64)
    confidence = records.probabilities[:, 0].astype(np.float64)
    bins, gap = bins_of(confidence), (records.prediction == records.target) - confidence
    names, cells = np.unique(np.concatenate([records.target, records.prediction]), return_inverse=True)
    target, prediction = np.split(cells, 2)
    hit = prediction == target

    def statistic(weights: np.ndarray) -> np.ndarray:
        n = weights.sum()
        true = np.bincount(target, weights, len(names))
        taken = np.bincount(prediction, weights, len(names))
        right = np.bincount(target, weights * hit, len(names))
        f1 = (2 * right / np.maximum(true + taken, 1))[true > 0].mean()
        return np.array([weights @ loss / n, f1, np.abs(np.bincount(bins, weights * gap, BINS)).sum() / n])

    return statistic


def per_class(records: Records, classes: Sequence[str]) -> list[dict[str, Any]]:
    """For every class: name, images, precision, recall and f1 in 0..1, or None if the class has no images."""
    right, taken, images = _class_counts(records, len(classes))
    precision, recall = right / np.maximum(taken, 1), right / np.maximum(images, 1)
    f1 = 2 * right / np.maximum(taken + images, 1)
    return [
        {
            "class": name,
            "images": int(images[i]),
            "precision": float(precision[i]) if images[i] else None,
            "recall": float(recall[i]) if images[i] else None,
            "f1": float(f1[i]) if images[i] else None,
        }
        for i, name in enumerate(classes)
    ]


def confusion(records: Records, classes: Sequence[str]) -> np.ndarray:
    """int64 (classes, classes): rows are targets, columns predictions."""
    n = len(classes)
    return np.bincount(records.target * n + records.prediction, minlength=n * n).reshape(n, n)


def confused_pairs(counts: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Every confused pair of classes, the most frequent first. `counts` is the confusion matrix.

    Each row has target, prediction, the number of images, and their share of the target's images (0..1).
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pairs = [(int(t), int(p)) for t, p in np.argwhere(counts > 0) if t != p]
    pairs.sort(key=lambda pair: (-counts[pair], pair))
    return [
        {
            "target": classes[t],
            "prediction": classes[p],
            "images": int(counts[t, p]),
            "share_of_target": float(shares[t, p]),
        }
        for t, p in pairs
    ]
