"""Which differences are called real: against the definitions, scipy, and simulation."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from scipy import stats

from resnet_dist.evaluation.significance import LEVEL, holm, sign_test, t_interval


def mcnemar(b: int, c: int) -> float:
    """The exact test from its definition: the chance of a split at least as uneven, each side being as likely."""
    n = b + c
    chances = [comb(n, k) / 2**n for k in range(n + 1)]
    return min(1.0, sum(chance for chance in chances if chance <= chances[b] * (1 + 1e-9)))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (12, 12), (2, 30)])
def test_with_one_run_each_p_equals_mcnemar(b: int, c: int) -> None:
    first = np.array([[True] * b + [False] * c + [True] * 40 + [False] * 7])
    second = np.array([[False] * b + [True] * c + [True] * 40 + [False] * 7])
    found = sign_test(first, second)
    assert (found.first_better, found.second_better) == (b, c)
    assert found.p == pytest.approx(mcnemar(b, c))


def test_with_several_runs_an_image_counts_once() -> None:
    """Two seeds against three: compared by the share of the runs that are right."""
    first = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)  # shares 1, 1/2, 1/2, 0
    second = np.array([[1, 1, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0]], bool)  # 1, 2/3, 1/3, 1/3
    found = sign_test(first, second)
    assert (found.first_better, found.second_better) == (1, 2)


def test_copies_of_a_run_do_not_lower_p() -> None:
    random = np.random.default_rng(0)
    first, second = random.random((1, 200)) < 0.9, random.random((1, 200)) < 0.85
    once = sign_test(first, second)
    assert sign_test(np.repeat(first, 5, axis=0), np.repeat(second, 5, axis=0)) == once


def test_holm_equals_the_definition() -> None:
    random = np.random.default_rng(1)
    for n in (1, 2, 5, 15):
        p = random.random(n) ** 3
        corrected = holm(list(p))
        for level in (0.01, 0.05, 0.2, 0.7):
            rejected = set()
            for rank, place in enumerate(np.argsort(p)):
                if p[place] > level / (n - rank):
                    break
                rejected.add(int(place))
            assert {i for i in range(n) if corrected[i] <= level} == rejected


def test_t_interval_equals_scipy() -> None:
    values = [0.91, 0.94, 0.925, 0.93]
    wanted = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(wanted)
    assert t_interval([0.99, 1.0])[1] == 1.0


def test_equal_techniques_are_rarely_called_different() -> None:
    """Six techniques of one accuracy with two seeds each, hard and easy images: under 5 % of the comparisons err."""
    random = np.random.default_rng(2)
    wrong = 0
    for _ in range(300):
        ease = random.beta(5, 0.6, 150)
        right = random.random((6, 2, 150)) < ease
        wrong += min(holm([sign_test(right[a], right[b]).p for a, b in combinations(range(6), 2)])) < LEVEL
    assert wrong / 300 < LEVEL + 3 * (LEVEL * (1 - LEVEL) / 300) ** 0.5


def test_a_large_difference_is_found() -> None:
    random = np.random.default_rng(3)
    found = 0
    for _ in range(50):
        right = [random.random((1, 300)) < share for share in (0.95, 0.85)]
        found += sign_test(*right).p < LEVEL
    assert found > 45


def test_p_is_symmetric() -> None:
    random = np.random.default_rng(4)
    first, second = random.random((2, 30)) < 0.5, random.random((3, 30)) < 0.7
    for a, b in product((first, second), repeat=2):
        assert sign_test(a, b).p == sign_test(b, a).p
