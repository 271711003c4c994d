"""Choose a confidence threshold per class so that predictions above it reach a given precision."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resnet_dist.evaluation.intervals import lower_bound
from resnet_dist.evaluation.records import Records

CONFIDENCE = 0.95  # that a class reaches the precision
LOOKS = 5  # thresholds that are tried per class


@dataclass(frozen=True)
class Threshold:
    """The confidence threshold of a class, and statistics of the images on which it was chosen.

    Attributes:
        threshold: 0..1, or None if no threshold proves the precision; predict then never predicts the class.
        images: the number of images predicted as the class.
        kept: how many of them reach the threshold.
        right: how many of the kept images have the class as their label.
        lower: the lower confidence bound of the precision of the kept images (0 if there are none).
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
    """The smallest number of images, all predicted correctly, that proves a precision above 0 and below 1."""
    return math.ceil(math.log(1 - confidence) / math.log(precision))


def thresholds(records: Records, num_classes: int, precision: float) -> list[Threshold]:
    """For every class, the threshold that keeps the most images and proves `precision` (above 0 and below 1).

    A threshold proves it if the one-sided lower bound of Clopper and Pearson reaches it. Up to five thresholds are
    tried, at numbers of images that do not depend on which predictions are right, each with a fifth of the allowed
    error. So the precision of a class on new images is below `precision` in at most 5 % of the cases.
    """
    right = records.prediction == records.target
    chosen = [records.prediction == number for number in range(num_classes)]
    return [_threshold(records.probabilities[mask, 0], right[mask], precision) for mask in chosen]


def _threshold(confidence: np.ndarray, right: np.ndarray, precision: float) -> Threshold:
    order = np.argsort(-confidence, kind="stable")
    confidence, hits, n = confidence[order], np.cumsum(right[order]), len(order)
    counts, certainty = _cuts(n, precision)
    for count in counts[::-1]:
        kept = int(
            np.searchsorted(-confidence, -confidence[count - 1], side="right")
        )  # equal confidences stay together
        lower = lower_bound(int(hits[kept - 1]), kept, certainty)
        if lower >= precision:
            # Halfway to the next confidence, so that rounding on another machine does not matter.
            value = 0.0 if kept == n else float(confidence[kept - 1].astype(float) + confidence[kept]) / 2
            return Threshold(value, n, kept, int(hits[kept - 1]), lower)
    return Threshold(None, n, 0, 0, 0.0)


def _cuts(n: int, precision: float) -> tuple[np.ndarray, float]:
    """Numbers of images to keep, rising, and the confidence per number that gives CONFIDENCE for all together."""
    for looks in range(LOOKS, 0, -1):
        certainty = 1 - (1 - CONFIDENCE) / looks
        least = fewest(precision, certainty)
        if least <= n:
            return np.unique(np.geomspace(least, n, looks).round().astype(int)) if looks > 1 else np.array(
                [n]
            ), certainty
    return np.empty(0, int), CONFIDENCE


def abstained(records: Records, limits: Sequence[float | None]) -> np.ndarray:
    """bool (n,): whether the best probability is below the threshold of its class, or that threshold is None."""
    lowest = np.array([np.inf if limit is None else limit for limit in limits])
    return np.asarray(records.probabilities[:, 0] < lowest[records.prediction])
