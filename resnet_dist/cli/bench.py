"""`resnet-dist bench`: where the time of training goes on this machine, and what to change."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resnet_dist.config.fields import out_of_range
from resnet_dist.config.schema import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PreprocessConfig,
    RunConfig,
    SystemConfig,
    TrainConfig,
)
from resnet_dist.files.outputs import json_problems

if TYPE_CHECKING:
    from accelerate import Accelerator

    from resnet_dist.bench.timing import Plan
    from resnet_dist.training.job import Job


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the machine, loading, computing and whole training, and say in one line what to change."""

    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig(model="resnet18", weights="none")
    optim: OptimConfig = OptimConfig()
    system: SystemConfig = SystemConfig()
    regimes: tuple[Literal["full", "layer4+head", "head"], ...] = ("full", "layer4+head", "head")
    """What learns: everything, the last stage and the head, the head."""
    windows: int = 5
    """Windows of which the median is taken."""
    window_steps: int | None = None
    """Steps in a window (default: as many as take half a second)."""
    warmup_steps: int | None = None
    """Steps before the first window (default: 2 on a CPU, 20 on a GPU)."""
    epochs: int = 3
    """Epochs of whole training in each regime; the first is reported by itself."""
    epoch_steps: int | None = None
    """Steps in such an epoch, of images spread over DATA (default: 4 per loader process, at least 6)."""
    predict: bool = True
    """Also export the network and time prediction from files to labels."""
    json: str | None = None
    """Write everything that was measured to this file."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from train_config(self, "DATA").problems()
        yield from cache_problems(self)
        yield from out_of_range(self, 1, math.inf, "windows", "window_steps", "epochs", "epoch_steps")
        yield from out_of_range(self, 0, math.inf, "warmup_steps")
        yield from json_problems("--json", self.json, "machine", "regimes")
        if not self.regimes:
            yield "--regimes is empty: name at least one of full, layer4+head, head"


def cache_problems(cfg: Any) -> Iterator[str]:
    """What would be measured as `--cache device` and is not that."""
    if cfg.data.cache == "device" and (cfg.augment.aug != "none" or cfg.augment.mixup or cfg.augment.cutmix):
        yield "--cache device keeps images that do not change at random: add --aug none, or take --cache ram"


def train_config(cfg: Any, data: str) -> TrainConfig:
    """The training that is measured; of `data` where the config names none.

    Compiled from the first step on or not at all: otherwise both would stand in one table.
    """
    compile_ = "on" if cfg.system.compile == "on" else "off"
    return TrainConfig(
        data=replace(cfg.data, data=cfg.data.data or data),
        preprocess=cfg.preprocess,
        augment=cfg.augment,
        model=cfg.model,
        optim=cfg.optim,
        run=RunConfig(epochs=2),
        system=replace(cfg.system, compile=compile_),
    )


def main(cfg: Config) -> int:
    """Measure, print, write the JSON file. Returns the exit code. Raises ResnetDistError."""
    from resnet_dist.bench.report import lines, make_report
    from resnet_dist.bench.training import enough_steps
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
            plan = plan_of(cfg, accelerator.device.type)
            found, job = make_report(accelerator, chosen, cfg.regimes, plan, cfg.epochs, steps, show)
            found["settings"]["data"] = "synthetic" if cfg.data.data is None else "images"
            if cfg.predict:
                show("measuring prediction ...")
                found["predict"] = on_main(accelerator, lambda: time_prediction(job, Path(own), plan))
    for text in lines(found):
        show(text)
    if cfg.json is not None:
        on_main(accelerator, lambda: write_atomically(Path(cfg.json or ""), to_json(found)))
    accelerator.end_training()
    return 0


def printer(accelerator: "Accelerator") -> Callable[[str], None]:
    """What prints a line, on the main process only."""

    def show(line: str) -> None:
        if accelerator.is_main_process:
            print(line, flush=True)

    return show


def with_data(accelerator: "Accelerator", cfg: Any, steps: int, folder: Path) -> TrainConfig:
    """The training that is measured, of so many steps in an epoch; where no DATA is named, of photographs made in
    `folder` of the main process."""
    from resnet_dist.bench.synthetic import photographs
    from resnet_dist.runtime.accelerate import on_main

    made = on_main(accelerator, lambda: str(folder / "photographs"))
    if cfg.data.data is None:
        printer(accelerator)("no DATA: synthetic photographs")
        count = steps * accelerator.num_processes * cfg.data.batch_size * cfg.optim.grad_accum
        on_main(accelerator, lambda: photographs(Path(made), count))
    return train_config(cfg, made)


def plan_of(cfg: Config, device: str) -> "Plan":
    """How long to measure."""
    from resnet_dist.bench.timing import Plan

    warmup = cfg.warmup_steps if cfg.warmup_steps is not None else 20 if device == "cuda" else 2
    return Plan(cfg.windows, cfg.window_steps, warmup)


def time_prediction(job: "Job", folder: Path, plan: "Plan") -> dict[str, Any]:
    """Export the network as it is, and time the predictor on a batch of files: to labels, and its start."""
    from export.predict import Predictor
    from export.run import ExportConfig, run_export
    from resnet_dist.bench.timing import summary
    from resnet_dist.model.checkpoint import save_best
    from resnet_dist.training.state import Best

    checkpoint = folder / "bench.safetensors"
    save_best(checkpoint, job.model, job.described(Best({}, 0, "raw")))
    run_export(ExportConfig(run=str(checkpoint), output_dir=str(folder / "export"), images=1), verbose=False)
    table = job.index.train
    files = [table.path(i) for i in range(min(len(table), job.cfg.data.batch_size))]
    start = time.perf_counter()
    predictor = Predictor(folder / "export" / "model.onnx", providers="cpu")
    list(predictor.predict(files))
    first = time.perf_counter() - start
    seconds = []
    for _ in range(plan.windows):
        start = time.perf_counter()
        list(predictor.predict(files))
        seconds.append(time.perf_counter() - start)
    return {**summary(seconds, 1).of_images(len(files)), "seconds_to_first_labels": first}
