"""What the three measurements do alike: start, make images if none are given, measure, print and write the result."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from resnet_dist.bench.options import MeasuredTraining
from resnet_dist.bench.synthetic import photographs
from resnet_dist.bench.training import enough_steps
from resnet_dist.config.schema import TrainConfig
from resnet_dist.files.run import to_json, write_atomically
from resnet_dist.runtime.accelerate import on_main, start
from resnet_dist.runtime.faults import machine_errors

TEMPORARY = "resnet-dist-bench-"  # prefix of a folder that is removed at the end


@dataclass(frozen=True)
class Setup:
    """What a measurement works with.

    Attributes:
        accelerator: that of this process.
        cfg: the training to measure; its images exist.
        steps: optimizer steps per epoch.
        folder: a temporary folder of this process.
        say: prints a line on the main process, such as what is measured next.
    """

    accelerator: Accelerator
    cfg: TrainConfig
    steps: int
    folder: Path
    say: Callable[[str], object]


@dataclass(frozen=True)
class Result:
    """What was measured: plain JSON values, and the same as lines of text."""

    values: dict[str, Any]
    lines: Sequence[str]


def run_measurement(cfg: MeasuredTraining, measure: Callable[[Setup], Result]) -> None:
    """Measure, then print the result and write it to the JSON file, if one is given.

    Every process of a launch must call this. Raises ResnetDistError.
    """
    accelerator, line = start(cfg.system)
    say = print_on_main(accelerator)
    say(line)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as name:
        folder = Path(name)
        steps = cfg.epoch_steps or enough_steps(accelerator, cfg.train_config(""))
        training = with_images(accelerator, cfg, steps, folder, say)
        with machine_errors(accelerator, cfg.batch_size, cfg.optim.grad_accum):
            result = measure(Setup(accelerator, training, steps, folder, say))
    on_main(accelerator, lambda: publish(result, cfg.json))


def print_on_main(accelerator: Accelerator) -> Callable[[str], None]:
    """A function that prints a line on the main process, and nothing on the others."""

    def say(line: str) -> None:
        if accelerator.is_main_process:
            print(line, flush=True)

    return say


def with_images(
    accelerator: Accelerator, cfg: MeasuredTraining, steps: int, folder: Path, say: Callable[[str], object]
) -> TrainConfig:
    """The training to measure. Without DATA, it gets synthetic photographs for one epoch of `steps` steps.

    The main process writes them into its `folder`.
    """
    made = on_main(accelerator, lambda: str(folder / "photographs"))
    if cfg.data.data is None:
        say("no DATA: synthetic photographs are used")
        count = steps * cfg.images_per_step(accelerator.num_processes)
        on_main(accelerator, lambda: photographs(Path(made), count))
    return cfg.train_config(made)


def publish(result: Result, file: str | None) -> None:
    """Print the lines of a result, and write its values to the JSON file, if one is given."""
    for line in result.lines:
        print(line, flush=True)
    if file is not None:
        write_atomically(Path(file), to_json(result.values))
