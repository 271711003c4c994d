"""The learning-rate range test: its rates, its losses, what it suggests, and that the suggestion is good."""

import csv
import itertools
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist.cli.main import main
from resnet_dist.config.schema import OptimConfig
from resnet_dist.data.transforms import Batch
from resnet_dist.training import lr_range
from resnet_dist.training.job import Job
from resnet_dist.training.loop import Learner, begin_phase, set_rates, train_step
from resnet_dist.training.lr_range import (
    RangeTest,
    longest_decrease,
    range_test,
    rates_for,
    rising,
    steepest,
    typed,
    valley,
)
from resnet_dist.training.optim import rates_now
from tests.conftest import TINY
from tests.runtime.launch import together
from tests.training.helpers import config_of, job_of

Refused = Callable[..., str]


def made(losses: np.ndarray, start: float = 1e-6, end: float = 1.0) -> RangeTest:
    return RangeTest(rising(start, end, len(losses)), list(losses), list(losses))


def test_rates_rise_by_one_factor() -> None:
    rates = rising(1e-7, 10.0, 100)
    assert rates[0] == 1e-7 and rates[-1] == pytest.approx(10) and len(rates) == 100
    np.testing.assert_allclose(rates, np.geomspace(1e-7, 10, 100), rtol=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_longest_decrease_is_as_long_as_any(seed: int) -> None:
    """Against every subsequence."""
    values = np.random.default_rng(seed).integers(0, 8, 10).tolist()
    found = longest_decrease(values)
    assert found == sorted(set(found))
    assert all(values[a] > values[b] for a, b in itertools.pairwise(found))
    longest = max(
        size
        for size in range(1, 11)
        for chosen in itertools.combinations(values, size)
        if all(a > b for a, b in itertools.pairwise(chosen))
    )
    assert len(found) == longest


def test_steepest_is_where_the_slope_is() -> None:
    """A loss that falls like a logistic curve in the logarithm of the rate, and then grows: steepest at 1e-3."""
    x = np.linspace(-6, 0, 121)
    losses = 1 - 0.8 / (1 + np.exp(-4 * (x + 3))) + np.where(x > -1, (x + 1) * 3, 0)
    assert math.log10(steepest(made(losses)) or 1) == pytest.approx(-3, abs=0.06)


def test_valley_is_in_the_middle_of_the_longest_decrease() -> None:
    """Flat to 1e-5, falling to 1e-2, then rising; with noise that a valley may pass over."""
    x = np.linspace(-6, 0, 121)
    losses = np.interp(x, [-6, -5, -2, 0], [1, 1, 0.1, 3]) + np.random.default_rng(0).normal(0, 1e-3, 121)
    assert math.log10(valley(made(losses)) or 1) == pytest.approx(-3.5, abs=0.2)


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    rising_loss = made(np.linspace(1, 2, 40))
    assert steepest(rising_loss) is None and valley(rising_loss) is None


def test_suggestion_sets_every_rate() -> None:
    optim = OptimConfig(lr=0.1, lr_groups={"stem": 1e-3, "head": 0.2})
    assert typed(rates_for(optim, 0.1, 0.01)) == '--lr 1.0e-02 --lr-groups "stem=1.0e-04 head=2.0e-02"'
    assert typed(rates_for(OptimConfig(lr_backbone=1e-3), 0.1, 0.2)) == "--lr 2.0e-01 --lr-backbone 2.0e-03"


@pytest.mark.parametrize("other", [[], ["--lr-backbone", "0.002"], ["--lr-groups", "layer4=0.03 head=0.5"]])
def test_train_with_what_is_suggested_trains_with_what_was_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[str]
) -> None:
    """With --lr-base-size, which multiplies the rates by 2 here: the tried rate is the value of --lr."""
    options = [folder, *TINY, "-b", "8", "--lr-base-size", "4"]
    job = job_of(tmp_path / "find", *options, "--lr", "0.01", *other)
    tried: list[dict[str, float]] = []

    def note(job: Job, learner: Learner, batches: Sequence[Batch]) -> None:
        tried.append(rates_now(learner.optimizer))
        train_step(job, learner, batches)

    monkeypatch.setattr(lr_range, "train_step", note)
    test = range_test(job, job.plan.phases[-1], 1e-3, 2e-3, 2)
    asked = config_of(*options, "--lr", "0.01", *other).optim
    for rate, rates in zip(test.rates, tried, strict=True):
        words = shlex.split(typed(rates_for(asked, job.plan.optimizer.base_lr, rate)))
        phase = job_of(tmp_path / f"{rate}", *options, *words).plan.phases[-1]
        assert phase.rates["head"] == pytest.approx(2 * rate * (50 if "--lr-groups" in other else 1))
        assert phase.rates == pytest.approx(rates)


def test_losses_are_those_of_the_loop_at_these_rates(folder: Path, tmp_path: Path) -> None:
    """Step by step with the loop's own functions on a second network; another group keeps its ratio."""
    options = [folder, *TINY, "-b", "8", "--recipe", "discriminative", "--lr", "0.01", "--aug", "none"]
    job, other = job_of(tmp_path / "a", *options), job_of(tmp_path / "b", *options)
    test = range_test(job, job.plan.phases[-1], 1e-3, 1e-2, 4)
    learner = begin_phase(other, other.plan.phases[-1])
    learner.source.fill(other)
    other.model.train()
    batches = itertools.chain(*(learner.source.train_loader.epoch(epoch) for epoch in (0, 1)))
    for rate, loss, step in zip(test.rates, test.losses, batches, strict=False):
        set_rates(learner.optimizer, rate / 0.01)
        rates = rates_now(learner.optimizer)
        assert rates["head"] == pytest.approx(rate) and rates["layer1"] == pytest.approx(rate / 100)
        learner.tally.values.zero_()
        train_step(other, learner, step)
        assert float(learner.tally.loss / learner.tally.weight) == loss
    assert len(test.losses) == 4
    a, b = job.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lr") / "out"
    options = [*TINY, "-b", "8", "--recipe", "feature-extractor", "--steps", "30", "-o", str(out)]
    assert main(["lr-find", str(folder), *options, "--lr-start", "1e-4", "--lr-end", "1e3"]) == 0
    return out


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "lr_find.csv").open(newline="") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def test_files_and_stop(found: Path) -> None:
    """It stops before the last rate, for the loss diverges; the average is the debiased exponential one."""
    table = rows(found)
    assert 5 < len(table) < 30
    average = 0.0
    for number, row in enumerate(table, 1):
        average = 0.9 * average + 0.1 * row["loss"]
        assert row["smoothed"] == pytest.approx(average / (1 - 0.9**number))
    with Image.open(found / "lr_find.png") as image:
        assert min(image.size) > 300
    assert sorted(file.name for file in found.iterdir()) == ["lr_find.csv", "lr_find.png"], "and no run"


@pytest.mark.matrix
def test_two_processes_see_the_same(folder: Path, tmp_path: Path) -> None:
    """The same global batch in two processes: the same losses, the same stop."""
    options = ["lr-find", folder, *TINY, "--recipe", "feature-extractor-bn-eval", "--steps", "20", "--lr-end", "1e3"]
    together(2, *options, "-b", "4", "-o", tmp_path / "two")
    assert main([str(option) for option in (*options, "-b", "8", "-o", tmp_path / "one")]) == 0
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_options_that_lr_find_refuses(folder: Path, refused: Refused, tmp_path: Path) -> None:
    assert "must be above --lr-start" in refused(2, "lr-find", folder, "--lr-start", "1", "--lr-end", "0.5")
    assert "--phase-number 3: the recipe has 2 phases" in refused(
        2, "lr-find", folder, "--recipe", "discriminative", "--phase-number", "3"
    )
    assert "--dry-run belongs to train" in refused(2, "lr-find", folder, "--dry-run")
    said = refused(2, "lr-find", folder, *TINY, "--lr", "0", "-o", tmp_path / "x")
    assert "--lr 0: there is nothing to scale" in said


@pytest.mark.matrix
def test_suggestion_beats_ten_times_more_and_less(shared: Path, tmp_path: Path) -> None:
    """Full fine-tuning of real weights on real photographs: the training loss of the second epoch."""
    options = [shared / "hymenoptera", "--recipe", "full-finetune", "--model", "resnet18", "-b", "32", "--workers", "0"]
    options += ["--img-size", "80", "--resize", "92", "--weights", shared / "weights/resnet18.safetensors"]
    job = job_of(tmp_path / "find", *options)
    rate = steepest(range_test(job, job.plan.phases[-1], 1e-6, 10.0, 50))
    assert rate is not None
    losses: dict[float, float] = {}
    for factor in (0.1, 1.0, 10.0):
        job = job_of(tmp_path / str(factor), *options, "--lr", f"{rate * factor}")
        learner = begin_phase(job, job.plan.phases[-1])
        learner.source.fill(job)
        job.model.train()
        for epoch in range(2):
            learner.tally.values.zero_()
            for batches in learner.source.train_loader.epoch(epoch):
                train_step(job, learner, batches)
        losses[factor] = float(learner.tally.loss / learner.tally.weight)
    print(f"steepest {rate:.2e}: training loss {losses}")
    assert losses[1.0] < 0.9 * min(losses[0.1], losses[10.0])
