"""The learning-rate range test (Smith 2015, arXiv:1506.01186): raise the rate at every step until the loss diverges.

The steps are those of the loop's `train_step`, on a network that is then discarded.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resnet_dist.config.schema import OptimConfig
from resnet_dist.data.transforms import Batch
from resnet_dist.errors import NonFiniteError
from resnet_dist.model.trainable import train_mode
from resnet_dist.training.job import Job
from resnet_dist.training.loop import Learner, begin_phase, end_phase, set_rates, train_step
from resnet_dist.training.optim import scaled
from resnet_dist.training.plan import PlannedPhase
from resnet_dist.training.tally import Sums

SMOOTHING = 0.9
DIVERGED = 4.0  # times the lowest smoothed loss: fastai's limit


@dataclass(frozen=True)
class RangeTest:
    """What the test saw, one entry per step.

    Attributes:
        rates: the base learning rate (`--lr`) that the step was taken with.
        losses: mean loss over the global batch, before the step.
        smoothed: their exponential moving average, without the bias of its start.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]


def rising(start: float, end: float, steps: int) -> list[float]:
    """`steps` > 1 rates from start to end, at equal ratios."""
    return [start * (end / start) ** (step / (steps - 1)) for step in range(steps)]


def range_test(job: Job, phase: PlannedPhase, start: float, end: float, steps: int) -> RangeTest:
    """Train with rising rates until the last one, or until the loss diverges; all groups keep their ratios.

    A rate is a value of --lr: its step is the one that `train` would take with that --lr and the same other options.
    The plan's base rate must be above 0. Every process must call this; the loss is that of the global batch, so all
    stop after the same step. Raises NonFiniteError if the loss was never finite, StopRequested if a signal asked to
    stop.
    """
    learner = begin_phase(job, phase)
    learner.source.fill(job)
    train_mode(job.model, phase.updating)
    rates, average = rising(start, end, steps), 0.0
    losses: list[float] = []
    smoothed: list[float] = []
    with job.display.epoch("lr-find", steps):
        for number, (rate, batches) in enumerate(zip(rates, _endless(job, learner), strict=False), 1):
            set_rates(learner.optimizer, rate / job.plan.optimizer.base_lr)
            train_step(job, learner, batches)
            loss, images = _global_loss(job, learner)
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            value = average / (1 - SMOOTHING**number)
            if not math.isfinite(value) or value > DIVERGED * min(smoothed, default=value):
                break
            losses.append(loss)
            smoothed.append(value)
            job.display.advance(number, {"lr": f"{rate:.2e}", "loss": f"{value:.4f}"}, images)
            job.stop.check()
    end_phase(job, learner)
    if not losses:
        raise NonFiniteError(f"the loss is not finite at the first step, with a rate of {start:g}; lower --lr-start")
    return RangeTest(rates[: len(losses)], losses, smoothed)


def _endless(job: Job, learner: Learner) -> Iterator[list[Batch]]:
    """The batches of all epochs, without end."""
    epoch = 0
    while True:
        yield from learner.source.train_loader.epoch(epoch)
        epoch += 1


def _global_loss(job: Job, learner: Learner) -> tuple[float, int]:
    """The mean loss of the step over all processes, and its number of images; NaN if a gradient was not finite."""
    sums = Sums(*job.accelerator.reduce(learner.tally.values.clone(), "sum").tolist())
    learner.tally.values.zero_()
    return math.nan if sums.nonfinite else sums.mean_loss, int(sums.images)


def steepest(test: RangeTest) -> float | None:
    """The rate at which the smoothed loss falls fastest per factor in the rate (fastai's `steep`); None if it never
    falls."""
    first, last = _trimmed(len(test.rates))
    slopes = [
        (test.smoothed[i + 1] - test.smoothed[i]) / math.log(test.rates[i + 1] / test.rates[i])
        for i in range(first, last - 1)
    ]
    if not slopes or min(slopes) >= 0:
        return None
    return test.rates[first + slopes.index(min(slopes))]


def valley(test: RangeTest) -> float | None:
    """The middle of the longest valley of the smoothed loss (fastai's `valley`); None if it never falls.

    A valley is a longest decreasing subsequence: losses that need not be neighbours, each below the one before.
    """
    first, last = _trimmed(len(test.rates))
    places = longest_decrease(test.smoothed[first:last])
    return test.rates[first + places[len(places) // 2]] if len(places) > 1 else None


def longest_decrease(values: Sequence[float]) -> list[int]:
    """The positions of a longest strictly decreasing subsequence, in order; of several, the one that ends first."""
    lengths, before = [1] * len(values), [-1] * len(values)
    for i, value in enumerate(values):
        for j in range(i):
            if value < values[j] and lengths[j] >= lengths[i]:
                lengths[i], before[i] = lengths[j] + 1, j
    place = lengths.index(max(lengths)) if values else -1
    chain = []
    while place >= 0:
        chain.append(place)
        place = before[place]
    return chain[::-1]


def _trimmed(steps: int) -> tuple[int, int]:
    """The range of steps for the suggestions: without the first tenth, where the average has too little history."""
    return steps // 10, steps


def rates_for(asked: OptimConfig, base_lr: float, rate: float) -> dict[str, Any]:
    """The settings for --lr `rate`, with the other rates that were set in proportion (lr_backbone, lr_groups).

    `base_lr`, above 0, is the value of --lr with which these rates were set.
    """
    new = scaled(asked, rate / base_lr)
    others = {"lr_backbone": new.lr_backbone, "lr_groups": new.lr_groups}
    return {"lr": rate, **{name: value for name, value in others.items() if value is not None}}


def typed(settings: Mapping[str, Any]) -> str:
    """The settings of `rates_for` as command-line options."""
    words = []
    for name, value in settings.items():
        pairs = value.items() if isinstance(value, Mapping) else ()
        text = '"' + " ".join(f"{stage}={lr:.1e}" for stage, lr in pairs) + '"' if pairs else f"{value:.1e}"
        words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)
