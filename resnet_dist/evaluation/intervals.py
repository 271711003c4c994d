"""95 % intervals of shares, of differences of accuracy, and of other statistics."""

import math
from collections.abc import Callable

import numpy as np

Interval = tuple[float, float]
Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution
RESAMPLES = 1000


def wilson(successes: int, n: int, z: float = Z95) -> Interval:
    """The score interval of a share of `n` > 0 independent cases, in 0..1 (Wilson 1927); 95 % by default."""
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def lower_bound(successes: int, n: int, confidence: float) -> float:
    """The one-sided lower bound of a share of `n` > 0 independent cases, in 0..1 (Clopper and Pearson 1934).

    For every share and `n`, the true share is below the bound in at most 1 - `confidence` of the samples.
    """
    from scipy.special import betaincinv  # it takes half a second to import

    return float(betaincinv(successes, n - successes + 1, 1 - confidence)) if successes else 0.0


def paired_drop(lost: int, won: int, n: int, z: float = Z95) -> Interval:
    """Interval of the drop in accuracy between two models (Newcombe 1998, method 1).

    `lost` and `won` count the images that only the first or only the second predicts correctly.
    """
    drop = (lost - won) / n
    half = z * math.sqrt(max(0.0, lost + won - (lost - won) ** 2 / n)) / n
    return drop - half, drop + half


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """The 2.5 % and 97.5 % points of statistics over resamples of `n` images (Efron 1979), float64 (2, statistics).

    `statistic` gets the number of times that each image is drawn, int64 (n,), and returns float64 (statistics,). The
    resamples are seeded, so the same images always give the same interval.
    """
    random = np.random.default_rng(seed)
    drawn = [statistic(np.bincount(random.integers(0, n, n), minlength=n)) for _ in range(resamples)]
    return np.asarray(np.quantile(np.stack(drawn), [0.025, 0.975], axis=0))
