"""Learning-rate schedules as a pure function of the optimizer step within a phase, so that resuming is arithmetic."""

import math
from typing import Any

from resnet_dist.config.schema import ScheduleConfig

ONECYCLE_START, ONECYCLE_FIRST, ONECYCLE_LAST = 0.3, 1 / 25, 1 / 25e4  # torch's OneCycleLR defaults


class Schedule:
    """The factor on every group's base learning rate.

    It counts optimizer steps, so the number of processes has no influence. A warmup comes first; the schedule then
    starts at its own step 0, as in torch's SequentialLR. All but `plateau` are functions of the step; for `plateau`,
    `state` counts the epochs in which the validation loss did not fall.
    """

    def __init__(self, cfg: ScheduleConfig, steps_per_epoch: int, epochs: int) -> None:
        self.cfg = cfg
        self.steps_per_epoch = steps_per_epoch
        self.warmup = min(cfg.warmup.steps(steps_per_epoch), steps_per_epoch * epochs)
        self.total = steps_per_epoch * epochs - self.warmup
        self.state: dict[str, Any] = {"lowest": None, "waited": 0, "falls": 0}

    def factor(self, step: int) -> float:
        """The factor at optimizer step `step` (from 0) of the phase."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return self._main(step - self.warmup)

    def _main(self, step: int) -> float:
        cfg = self.cfg
        if cfg.sched == "step":
            return float(cfg.lr_gamma ** (step // max(1, cfg.lr_step_size.steps(self.steps_per_epoch))))
        if cfg.sched == "multistep":
            passed = sum(step >= milestone.steps(self.steps_per_epoch) for milestone in cfg.lr_milestones)
            return float(cfg.lr_gamma**passed)
        if cfg.sched == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / max(1, self.total)))
        if cfg.sched == "onecycle":
            return _onecycle(step, self.total)
        if cfg.sched == "plateau":
            return float(cfg.lr_gamma ** self.state["falls"])
        return 1.0

    def end_epoch(self, val_loss: float) -> None:
        """Give `plateau` the validation loss of an epoch. A decrease of less than 0.01 % does not count (torch's
        threshold).
        """
        state = self.state
        if self.cfg.sched != "plateau":
            return
        if state["lowest"] is None or val_loss < state["lowest"] * (1 - 1e-4):
            state["lowest"], state["waited"] = val_loss, 0
            return
        state["waited"] += 1
        if state["waited"] > self.cfg.plateau_patience:
            state["falls"], state["waited"] = state["falls"] + 1, 0


def _onecycle(step: int, total: int) -> float:
    """The 1cycle policy (Smith & Topin 2017), in two cosine parts as torch's OneCycleLR; the peak is the base rate."""
    peak = ONECYCLE_START * total - 1
    if step <= peak:
        return _cosine_between(ONECYCLE_FIRST, 1.0, step / peak if peak > 0 else 1.0)
    return _cosine_between(1.0, ONECYCLE_LAST, min(1.0, (step - peak) / max(1e-9, total - 1 - peak)))


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
