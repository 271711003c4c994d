"""`resnet-dist bench ladder`: what each lever is worth on this machine, one after the other."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.cli.bench import train_config
from resnet_dist.config.fields import out_of_range
from resnet_dist.config.schema import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PreprocessConfig,
    SystemConfig,
)
from resnet_dist.files.outputs import json_problems


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train with every lever of speed off, then with one more on each time, and print what each is worth."""

    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig(model="resnet18", weights="none")
    optim: OptimConfig = OptimConfig()
    system: SystemConfig = SystemConfig()
    rounds: int = 3
    """Rounds over all rungs, of which the median is taken."""
    epochs: int = 2
    """Epochs of a rung in a round; the first does not count."""
    epoch_steps: int | None = None
    """Steps in such an epoch, of images spread over DATA (default: 4 per loader process, at least 6)."""
    json: str | None = None
    """Write everything that was measured to this file."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from train_config(self, "DATA").problems()
        yield from json_problems("--json", self.json, "machine", "rungs")
        yield from out_of_range(self, 1, math.inf, "rounds", "epoch_steps")
        yield from out_of_range(self, 2, math.inf, "epochs")


def main(cfg: Config) -> int:
    """Measure, print, write the JSON file. Returns the exit code. Raises ResnetDistError."""
    from resnet_dist.bench.ladder import climb, lines
    from resnet_dist.bench.machine import describe
    from resnet_dist.bench.training import enough_steps
    from resnet_dist.cli.bench import printer, with_data
    from resnet_dist.files.run import to_json, write_atomically
    from resnet_dist.runtime.accelerate import on_main, start
    from resnet_dist.runtime.faults import machine_errors

    accelerator, line = start(cfg.system)
    show = printer(accelerator)
    show(line)
    with tempfile.TemporaryDirectory(prefix="resnet-dist-bench-") as own:
        steps = cfg.epoch_steps or enough_steps(accelerator, train_config(cfg, ""))
        chosen = with_data(accelerator, cfg, steps, Path(own))
        with machine_errors(accelerator, cfg.data.batch_size, cfg.optim.grad_accum):
            rows = climb(chosen, cfg.rounds, cfg.epochs, steps, show)
    for text in lines(rows):
        show(text)
    if cfg.json is not None:
        content = to_json({"machine": describe(accelerator), "rungs": rows})
        on_main(accelerator, lambda: write_atomically(Path(cfg.json or ""), content))
    accelerator.end_training()
    return 0
