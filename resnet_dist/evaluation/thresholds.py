"""Confidence thresholds per class above which predictions reach a given precision."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resnet_dist.evaluation.intervals import lower_bound
from resnet_dist.evaluation.records import Records

CONFIDENCE = 0.95  # in each class, that its precision is at least what was asked for
LOOKS = 5  # cuts that are tried for a class


@dataclass(frozen=True)
class Threshold:
    """The confidence threshold of a class, and the images predicted as that class that it was chosen on.

    Attributes:
        threshold: 0..1, or None if no cut shows the precision, so that predict must always abstain from the class.
        images: how many images were predicted as the class.
        kept: how many of them reach the threshold; `right` how many of those have the class as their label.
        lower: the lower confidence bound of the precision of the kept ones (0 if there are none).
    """

    threshold: float | None
    images: int
    kept: int
    right: int
    lower: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def fewest(precision: float, confidence: float = CONFIDENCE) -> int:
    """The number of images, all predicted correctly, that it takes to show a precision in 0..1, both ends excluded."""
    return math.ceil(math.log(1 - confidence) / math.log(precision))


def thresholds(records: Records, num_classes: int, precision: float) -> list[Threshold]:
    """For every class the threshold with the most images kept at which `precision`, above 0 and below 1, is shown.

    Shown means: the one-sided lower bound of Clopper and Pearson reaches it. Up to five cuts are tried, at numbers of
    images that do not depend on what is right, each with a fifth of the allowed error, so that in each class the
    precision on further images is below `precision` in at most 5 % of the cases.
    """
    right = records.prediction == records.target
    chosen = [records.prediction == number for number in range(num_classes)]
    return [_threshold(records.probabilities[mask, 0], right[mask], precision) for mask in chosen]


def _threshold(confidence: np.ndarray, right: np.ndarray, precision: float) -> Threshold:
    order = np.argsort(-confidence, kind="stable")
    confidence, hits, n = confidence[order], np.cumsum(right[order]), len(order)
    counts, certainty = _cuts(n, precision)
    for count in counts[::-1]:
        kept = int(np.searchsorted(-confidence, -confidence[count - 1], side="right"))  # equal ones stay together
        lower = lower_bound(int(hits[kept - 1]), kept, certainty)
        if lower >= precision:
            # Halfway to the first that is left out: another machine's last digits must not decide.
            value = 0.0 if kept == n else float(confidence[kept - 1].astype(float) + confidence[kept]) / 2
            return Threshold(value, n, kept, int(hits[kept - 1]), lower)
    return Threshold(None, n, 0, 0, 0.0)


def _cuts(n: int, precision: float) -> tuple[np.ndarray, float]:
    """Numbers of images to keep, rising, and the confidence that each needs so that all together have CONFIDENCE."""
    for looks in range(LOOKS, 0, -1):
        certainty = 1 - (1 - CONFIDENCE) / looks
        least = fewest(precision, certainty)
        if least <= n:
            return np.unique(np.geomspace(least, n, looks).round().astype(int)) if looks > 1 else np.array(
                [n]
            ), certainty
    return np.empty(0, int), CONFIDENCE


def abstained(records: Records, limits: Sequence[float | None]) -> np.ndarray:
    """bool (n,): where the best class's probability is below its threshold, or it has none that can be reached."""
    lowest = np.array([np.inf if limit is None else limit for limit in limits])
    return np.asarray(records.probabilities[:, 0] < lowest[records.prediction])
