"""Significance of differences between networks on the same images, with several seeds and comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from resnet_dist.evaluation.intervals import Interval

LEVEL = 0.05


@dataclass(frozen=True)
class SignTest:
    """A sign test of two techniques: on how many images each is right more often, and the p-value."""

    first_better: int
    second_better: int
    p: float


def sign_test(first: np.ndarray, second: np.ndarray) -> SignTest:
    """The exact sign test over images. `first`, `second`: bool (runs, images), whether a run is right on an image.

    An image counts for the technique whose runs are right on it more often; if the techniques do not differ, both are
    equally likely. With one run each, this is McNemar's exact test (1947). Pooling (run, image) pairs instead would
    count an image once per seed and give p-values that are too small.
    """
    lead = first.sum(axis=0) * len(second) - second.sum(axis=0) * len(first)
    more, less = int((lead > 0).sum()), int((lead < 0).sum())
    p = float(stats.binomtest(more, more + less).pvalue) if more + less else 1.0
    return SignTest(more, less, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm 1979), which bounds the chance of any false finding."""
    n = len(p_values)
    corrected, highest = [1.0] * n, 0.0
    for rank, place in enumerate(sorted(range(n), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (n - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def t_interval(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean over at least two seeds (Student 1908), clipped to 0..1."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return max(0.0, mean - half), min(1.0, mean + half)
