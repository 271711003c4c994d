"""Find a learning rate: the range test of a recipe on the user's data, with a table, a plot and suggestions."""

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resnet_dist.config.fields import out_of_range
from resnet_dist.config.layers import from_keywords, keyword_signature
from resnet_dist.config.schema import TrainConfig
from resnet_dist.errors import Preempted, UsageError, python_errors
from resnet_dist.files.outputs import Kind, make_folder, table_with
from resnet_dist.runtime.notebook import html_table
from resnet_dist.runtime.signals import StopRequested, StopRequests, stop_requests
from resnet_dist.runtime.wording import counted

if TYPE_CHECKING:
    from resnet_dist.training.lr_range import RangeTest

COLUMNS = ("lr", "loss", "smoothed")
RANGE_TEST = Kind("a range test", "lr_find.csv", table_with(*COLUMNS))


@dataclass(frozen=True, kw_only=True)
class LrFindConfig(TrainConfig):
    """Find a learning rate: train a copy of the network while the rate rises, and see where the loss falls.

    Takes every option of train. Writes lr_find.png and lr_find.csv into --output-dir.
    """

    REFUSED: ClassVar = ("resume", "dry_run")  # options of train without a meaning here
    HELP: ClassVar = {"output_dir": "The folder for the plot and the table (default: runs/lr-find-<time>)."}

    lr_start: float = 1e-7
    """The first base learning rate."""
    lr_end: float = 10.0
    """The last one, if the loss has not diverged before."""
    steps: int = 100
    """Optimizer steps from the first rate to the last."""
    phase_number: int | None = None
    """The phase of the recipe to test, with the weights that the run begins with (default: the last)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from super().problems()
        yield from out_of_range(self, 0, math.inf, "lr_start", open_low=True)
        if not self.lr_start < self.lr_end < math.inf:
            yield f"--lr-end {self.lr_end:g}: must be above --lr-start {self.lr_start:g}"
        yield from out_of_range(self, 10, math.inf, "steps")
        if self.phase_number is not None and not 1 <= self.phase_number <= len(self.phase):
            yield f"--phase-number {self.phase_number}: the recipe has {counted(len(self.phase), 'phase')}"
        for name in self.REFUSED:
            if getattr(self.run, name):
                yield f"--{name.replace('_', '-')} belongs to train: leave it out"


@dataclass(frozen=True)
class LearningRates:
    """What a range test found.

    Attributes:
        path: the folder with lr_find.png and lr_find.csv.
        test: the learning rate and the loss of every step.
        suggested: "valley" and "steepest", the base learning rates that it suggests; empty if the loss never fell.
        settings: for each suggestion the keywords for `train`: lr, and the other rates that are set, in proportion.
    """

    path: Path
    test: "RangeTest"
    suggested: Mapping[str, float]
    settings: Mapping[str, Mapping[str, Any]]

    def _repr_html_(self) -> str:
        rows = [(name, f"{rate:.1e}") for name, rate in self.suggested.items()]
        return html_table(f"Learning rates {self.path}", rows or [("suggested", "none: the loss never fell")])


def lr_find(data: str | os.PathLike[str] | None = None, *, verbose: bool = False, **settings: Any) -> LearningRates:
    """Run a learning-rate range test: train a copy of the network while the rate rises, and see where the loss falls.

    The keywords are the options of `resnet-dist lr-find`: those of `train`, and lr_start, lr_end, steps, phase_number.
    `train(data, **lr_find(data).settings["valley"])` trains with what it suggests. In a launch of several processes
    every process must call this. Raises UsageError, DataError, MachineError, NonFiniteError if the first loss is not
    finite, or Preempted if a signal stops it.
    """
    with python_errors():
        return run_lr_find(from_keywords(LrFindConfig, {"data": data, **settings}), verbose=verbose)


lr_find.__signature__ = keyword_signature(LrFindConfig, verbose=False)  # type: ignore[attr-defined]


def run_lr_find(cfg: LrFindConfig, *, verbose: bool = True) -> LearningRates:
    """Run the test and write its picture and table; with `verbose`, print what it suggests. Raises ResnetDistError."""
    with stop_requests() as stop:
        from resnet_dist.runtime.isolation import process_settings_restored

        try:
            with process_settings_restored():
                return _find(cfg, stop, verbose)
        except StopRequested:
            raise Preempted(
                "stopped by a signal before the test was over; nothing is written, start it again"
            ) from None


def _find(cfg: LrFindConfig, stop: StopRequests, verbose: bool) -> LearningRates:
    from resnet_dist.files.run import RunFolder
    from resnet_dist.runtime.accelerate import on_main, start
    from resnet_dist.runtime.display import Display
    from resnet_dist.runtime.faults import machine_errors
    from resnet_dist.training.job import build_job
    from resnet_dist.training.lr_range import range_test, rates_for, steepest, valley
    from resnet_dist.training.plan import make_plan

    accelerator, line = start(cfg.system, cfg.run.seed)
    stop.connect(cfg.system.dist_timeout)
    display = Display(accelerator.is_main_process, verbose)
    number = cfg.phase_number or len(cfg.phase)
    folder = on_main(accelerator, lambda: result_folder(cfg.run.output_dir))
    plan = make_plan(accelerator, cfg)
    base_lr = plan.optimizer.base_lr
    if base_lr == 0:
        raise UsageError("--lr 0: there is nothing to scale; leave it out")
    for text in (line, *plan.lines(), f"range test of phase {number}: {cfg.lr_start:g} to {cfg.lr_end:g}"):
        display.say(text)
    with machine_errors(accelerator, plan.share.batch_size, plan.share.accumulate):
        job = build_job(accelerator, plan, RunFolder(folder, active=False), display, stop)
        test = range_test(job, plan.phases[number - 1], cfg.lr_start, cfg.lr_end, cfg.steps)
        stop.finish()
    suggested = {name: rate for name, rate in (("valley", valley(test)), ("steepest", steepest(test))) if rate}
    settings = {name: rates_for(cfg.optim, base_lr, rate) for name, rate in suggested.items()}
    found = LearningRates(folder, test, suggested, settings)
    on_main(accelerator, lambda: write(found))
    for text in lines(found):
        display.say(text)
    return found


def result_folder(given: str | None) -> Path:
    """Create the folder of the results, before the test starts. Raises UsageError, MachineError."""
    folder = Path(given or f"runs/lr-find-{time.strftime('%Y%m%d-%H%M%S')}")
    make_folder(folder, RANGE_TEST)
    return folder


def write(found: LearningRates) -> None:
    """Write lr_find.csv and lr_find.png. On the main process. Raises MachineError."""
    from resnet_dist.files.run import to_csv, write_atomically
    from resnet_dist.report.plots import lr_range

    test = found.test
    columns = zip(test.rates, test.losses, test.smoothed, strict=True)
    write_atomically(found.path / RANGE_TEST.mark, to_csv(COLUMNS, columns))
    lr_range(found.path / "lr_find.png", test.rates, test.losses, test.smoothed, found.suggested)


def lines(found: LearningRates) -> list[str]:
    """The suggestions as options of train, and the files that were written."""
    from resnet_dist.training.lr_range import typed

    suggestions = [f"{name + ':':<10} {typed(settings)}" for name, settings in found.settings.items()]
    if not suggestions:
        suggestions = ["the loss never fell: is there something to learn? Try --lr-start lower, or more --steps"]
    return [*suggestions, f"written: {found.path / 'lr_find.png'} and lr_find.csv"]
