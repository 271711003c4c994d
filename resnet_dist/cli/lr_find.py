"""`resnet-dist lr-find`: the learning-rate range test of a recipe on the user's data."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from resnet_dist.config.fields import out_of_range
from resnet_dist.config.schema import TrainConfig
from resnet_dist.errors import Preempted, UsageError
from resnet_dist.files.outputs import Kind, make_folder, table_with
from resnet_dist.runtime.signals import StopRequested, StopRequests, stop_requests

if TYPE_CHECKING:
    from resnet_dist.training.job import Blueprint
    from resnet_dist.training.lr_range import RangeTest

COLUMNS = ("lr", "loss", "smoothed")
RANGE_TEST = Kind("a range test", "lr_find.csv", table_with(*COLUMNS))


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Find a learning rate: train a copy of the network while the rate rises, and see where the loss falls.

    Takes every option of train. Writes lr_find.png and lr_find.csv into --output-dir (default: runs/lr-find-<time>).
    """

    REFUSED: ClassVar = ("resume", "dry_run")  # options of train without a meaning here

    lr_start: float = 1e-7
    """The first base learning rate."""
    lr_end: float = 10.0
    """The last one, if the loss has not diverged before."""
    steps: int = 100
    """Optimizer steps from the first rate to the last."""
    phase_number: int | None = None
    """Which phase of the recipe is tried (default: the last), from the weights that the run begins with."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from super().problems()
        yield from out_of_range(self, 0, math.inf, "lr_start", open_low=True)
        if not self.lr_start < self.lr_end < math.inf:
            yield f"--lr-end {self.lr_end:g}: must be above --lr-start {self.lr_start:g}"
        yield from out_of_range(self, 10, math.inf, "steps")
        if self.phase_number is not None and not 1 <= self.phase_number <= len(self.phase):
            yield f"--phase-number {self.phase_number}: there are {len(self.phase)}"
        for name in self.REFUSED:
            if getattr(self.run, name):
                yield f"--{name.replace('_', '-')} belongs to train: leave it out"


def main(cfg: Config) -> int:
    """Run the test, write picture and table, and say which rates it suggests. Returns the exit code."""
    with stop_requests() as stop:
        try:
            _find(cfg, stop)
        except StopRequested:
            raise Preempted(
                "stopped by a signal before the test was over; nothing is written, start it again"
            ) from None
    return 0


def _find(cfg: Config, stop: StopRequests) -> None:
    from resnet_dist.files.run import RunFolder
    from resnet_dist.runtime.accelerate import on_main, start
    from resnet_dist.runtime.display import Display
    from resnet_dist.runtime.faults import machine_errors
    from resnet_dist.training.job import build_job, draw
    from resnet_dist.training.lr_range import range_test

    accelerator, line = start(cfg.system, cfg.run.seed)
    stop.connect(cfg.system.dist_timeout)
    display = Display(accelerator.is_main_process)
    number = cfg.phase_number or len(cfg.phase)
    folder = on_main(accelerator, lambda: result_folder(cfg.run.output_dir))
    blueprint = draw(accelerator, cfg)
    if not blueprint.cfg.optim.lr:
        raise UsageError("--lr 0: there is nothing to scale; leave it out")
    for text in (line, *blueprint.lines(), f"range test of phase {number}: {cfg.lr_start:g} to {cfg.lr_end:g}"):
        display.say(text)
    with machine_errors(accelerator, blueprint.cfg.data.batch_size, blueprint.cfg.optim.grad_accum):
        job = build_job(accelerator, blueprint, RunFolder(folder, active=False), display, stop)
        test = range_test(job, blueprint.cfg.phase[number - 1], cfg.lr_start, cfg.lr_end, cfg.steps)
        stop.finish()
    share, base = blueprint.batches.share, cfg.optim.lr_base_size
    again = share.global_batch / base if base else 1.0  # what --lr-base-size multiplies typed rates by
    for text in on_main(accelerator, lambda: write(folder, test, blueprint, again)):
        display.say(text)


def result_folder(given: str | None) -> Path:
    """The folder for the results, made before the work is done. Raises UsageError, MachineError."""
    folder = Path(given or f"runs/lr-find-{time.strftime('%Y%m%d-%H%M%S')}")
    make_folder(folder, RANGE_TEST)
    return folder


def write(folder: Path, test: "RangeTest", blueprint: "Blueprint", divide_by: float) -> list[str]:
    """lr_find.png and lr_find.csv, and what they say, in lines (see `typed` for `divide_by`). On the main process."""
    from resnet_dist.files.run import to_csv, write_atomically
    from resnet_dist.report.plots import lr_range
    from resnet_dist.training.lr_range import steepest, typed, valley

    suggested = {"valley": valley(test), "steepest": steepest(test)}
    rates = {name: rate for name, rate in suggested.items() if rate is not None}
    columns = zip(test.rates, test.losses, test.smoothed, strict=True)
    write_atomically(folder / RANGE_TEST.mark, to_csv(COLUMNS, columns))
    lr_range(folder / "lr_find.png", test.rates, test.losses, test.smoothed, rates)
    lines = [f"{name + ':':<10} {typed(blueprint.cfg.optim, rate, divide_by)}" for name, rate in rates.items()]
    if not lines:
        lines = ["the loss never fell: is there something to learn? Try --lr-start lower, or more --steps"]
    return [*lines, f"written: {folder / 'lr_find.png'} and lr_find.csv"]
