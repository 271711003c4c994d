"""Schedules against torch's own schedulers, stepped once per optimizer step."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules

from resnet_dist.config.schema import Duration, ScheduleConfig
from resnet_dist.training.schedule import Schedule

STEPS_PER_EPOCH, EPOCHS = 7, 6
TOTAL = STEPS_PER_EPOCH * EPOCHS
Make = Callable[[torch.optim.Optimizer], torch_schedules.LRScheduler]


def trace_of_torch(make: Make, steps: int = TOTAL) -> list[float]:
    """The rates of an optimizer with base rate 1 under a torch scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the order of two calls that are not made here
        schedule = make(optimizer)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
    return rates


def trace(cfg: ScheduleConfig, steps: int = TOTAL) -> list[float]:
    schedule = Schedule(cfg, STEPS_PER_EPOCH, EPOCHS)
    return [schedule.factor(step) for step in range(steps)]


CASES: dict[str, tuple[ScheduleConfig, Make]] = {
    "step": (
        ScheduleConfig(sched="step", lr_step_size=Duration(2), lr_gamma=0.1),
        lambda o: torch_schedules.StepLR(o, 2 * STEPS_PER_EPOCH, 0.1),
    ),
    "step-in-steps": (
        ScheduleConfig(sched="step", lr_step_size=Duration(5, "steps"), lr_gamma=0.5),
        lambda o: torch_schedules.StepLR(o, 5, 0.5),
    ),
    "multistep": (
        ScheduleConfig(sched="multistep", lr_milestones=(Duration(1), Duration(10, "steps"), Duration(4))),
        lambda o: torch_schedules.MultiStepLR(o, [7, 10, 28], 0.1),
    ),
    "cosine": (ScheduleConfig(sched="cosine"), lambda o: torch_schedules.CosineAnnealingLR(o, TOTAL)),
    "constant": (ScheduleConfig(sched="constant"), lambda o: torch_schedules.LambdaLR(o, lambda _: 1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: str) -> None:
    cfg, make = CASES[case]
    assert trace(cfg) == pytest.approx(trace_of_torch(make), abs=1e-12)


def test_onecycle_equals_torch() -> None:
    """All but the last step, after which torch's own refuses to be stepped; that one is at the smallest rate."""
    expected = trace_of_torch(lambda o: torch_schedules.OneCycleLR(o, 1.0, TOTAL, cycle_momentum=False), TOTAL - 1)
    found = trace(ScheduleConfig(sched="onecycle"))
    assert found[:-1] == pytest.approx(expected, abs=1e-12)
    assert found[-1] == pytest.approx(1 / 25e4, rel=1e-6)


def test_warm_up_comes_first_and_the_schedule_after_it() -> None:
    """The same as torch's SequentialLR of a linear warm-up and a schedule."""
    cfg = ScheduleConfig(sched="cosine", warmup=Duration(9, "steps"))

    def make(optimizer: torch.optim.Optimizer) -> torch_schedules.LRScheduler:
        linear = torch_schedules.LinearLR(optimizer, start_factor=0.1, total_iters=9)
        cosine = torch_schedules.CosineAnnealingLR(optimizer, TOTAL - 9)
        return torch_schedules.SequentialLR(optimizer, [linear, cosine], milestones=[9])

    assert trace(cfg) == pytest.approx(trace_of_torch(make), abs=1e-12)


def test_step_lr_of_the_tutorials_decays_after_seven_epochs() -> None:
    """StepLR(7, 0.1), the schedule that Accelerate steps twice as fast with two processes."""
    schedule = Schedule(ScheduleConfig(), steps_per_epoch=3, epochs=15)
    per_epoch = [schedule.factor(3 * epoch) for epoch in range(15)]
    assert per_epoch == pytest.approx([1.0] * 7 + [0.1] * 7 + [0.01])


def test_plateau_equals_torch() -> None:
    losses = [1.0, 0.9, 0.95, 0.91, 0.92, 0.9, 0.8, 0.8, 0.80001, 0.79999, 0.9, 0.9]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch_schedules.ReduceLROnPlateau(optimizer, factor=0.1, patience=2)
    schedule = Schedule(ScheduleConfig(sched="plateau", plateau_patience=2), STEPS_PER_EPOCH, len(losses))
    for loss in losses:
        reference.step(loss)
        schedule.end_epoch(loss)
        assert schedule.factor(0) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule.factor(0) < 0.05, "the losses were to make the rate fall twice"


def test_a_schedule_does_not_depend_on_processes() -> None:
    """In epochs, it is the same whatever the steps per epoch are."""
    for steps in (1, 5, 40):
        schedule = Schedule(ScheduleConfig(lr_step_size=Duration(2)), steps, 6)
        assert [schedule.factor(steps * epoch) for epoch in range(6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
