"""Windows, medians and percentiles, with a clock that the test sets."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from resnet_dist.bench.timing import Repeats, measure, summary


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


class Clock:
    """Time that passes only when a step says so."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.now, self.durations, self.steps = 0.0, durations, 0

    def step(self) -> None:
        self.now += next(self.durations)
        self.steps += 1


def endless(values: list[float], rest: float) -> Iterator[float]:
    yield from values
    while True:
        yield rest


def test_median_and_spread_are_those_of_the_windows(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps before the windows do not count; a window's time is divided by its steps."""
    clock = Clock(endless([100.0, 100.0], 1.0))
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    timing = measure(accelerator, clock.step, Repeats(windows=5, steps=3, warmup=2))
    assert (timing.seconds, timing.p10, timing.p90) == (1.0, 1.0, 1.0)
    assert (timing.windows, timing.steps, clock.steps) == (5, 3, 2 + 5 * 3)
    assert timing.host_share is None


def test_window_takes_half_a_second_by_default(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(endless([], 0.2))
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    timing = measure(accelerator, clock.step, Repeats(windows=2, steps=None, warmup=0))
    assert timing.steps == 3 and timing.seconds == pytest.approx(0.2)


def test_summary_agrees_with_numpy() -> None:
    seconds = list(np.random.default_rng(0).uniform(1, 2, 11))
    timing = summary(seconds, steps=4)
    assert timing.seconds == pytest.approx(np.median(seconds) / 4)
    assert timing.p10 == pytest.approx(np.quantile(seconds, 0.1) / 4)
    assert timing.p90 == pytest.approx(np.quantile(seconds, 0.9) / 4)


def test_rates_follow_from_the_seconds() -> None:
    timing = summary([1.0, 2.0, 4.0], steps=2)
    images = timing.of_images(32)
    assert images["images_per_second"] == 32 / images["seconds"] == 32.0
    rates = timing.rates(10.0)
    assert rates["median"] == 10.0 and rates["p10"] < rates["median"] < rates["p90"]


def test_a_real_step_is_measured(accelerator: Accelerator) -> None:
    """A sleep of 20 ms takes at least that, and not a hundred times as long."""
    timing = measure(accelerator, lambda: time.sleep(0.02), Repeats(windows=3, steps=1, warmup=1))
    assert 0.02 <= timing.p10 <= timing.seconds <= timing.p90 < 2
    assert torch.get_num_threads() >= 1
