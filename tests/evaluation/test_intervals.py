"""Intervals against scipy, and against what they promise: in simulations they hold the truth in about 95 %."""

import numpy as np
import pytest
from scipy import stats

from resnet_dist.evaluation.intervals import bootstrap, lower_bound, paired_drop, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (640, 644), (1, 2)])
def test_wilson_interval_equals_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("share", "n"), [(0.956, 153), (0.8, 300), (0.5, 40)])
def test_wilson_coverage_by_simulation(share: float, n: int) -> None:
    hits = np.random.default_rng(1).binomial(n, share, 2000)
    inside = [low <= share <= high for low, high in (wilson(int(k), n) for k in hits)]
    assert 0.93 < np.mean(inside) < 0.97


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (640, 644), (1, 2)])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_lower_bound_equals_scipy(k: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(k, n, alternative="greater").proportion_ci(confidence, method="exact").low
    assert lower_bound(k, n, confidence) == pytest.approx(expected, abs=1e-12)


def test_coverage_of_the_paired_drop_by_simulation() -> None:
    """Of 2,000 simulated pairs of classifiers, the interval holds the true drop in about 95 %."""
    random = np.random.default_rng(0)
    shares = [0.06, 0.03, 0.91]  # only the first right, only the second, both or none
    counts = random.multinomial(400, shares, size=2000)
    inside = [low <= 0.03 <= high for low, high in (paired_drop(int(a), int(b), 400) for a, b, _ in counts)]
    assert 0.93 < np.mean(inside) < 0.97


def test_bootstrap_of_a_mean_equals_scipy() -> None:
    values = np.random.default_rng(2).exponential(size=80)
    found = bootstrap(lambda weights: np.array([weights @ values / 80]), 80, resamples=4000)[:, 0]
    expected = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=3).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_is_deterministic_and_uses_every_image() -> None:
    seen = []

    def weighted(weights: np.ndarray) -> np.ndarray:
        seen.append(weights)
        return np.array([weights @ np.arange(50.0)])

    first, again, other = (bootstrap(weighted, 50, resamples=20, seed=seed) for seed in (0, 0, 1))
    assert len(seen) == 60 and all(weights.sum() == 50 and len(weights) == 50 for weights in seen)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
