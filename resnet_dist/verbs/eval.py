"""`resnet-dist eval`: exact metrics of a run or a checkpoint, with one line per image."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resnet_dist.config import SystemConfig, option, out_of_range

if TYPE_CHECKING:
    from resnet_dist.data.index import ImageTable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluate a run or a checkpoint in float32: loss, top-1, top-5, macro-F1, every class, every image."""

    run: str | None = option(None, positional=True)
    """A run folder, or a checkpoint (.safetensors) that resnet-dist wrote."""
    data: str | None = option(None, positional=True)
    """A folder or a CSV manifest of images (default: the run's own data, with the split that it used)."""
    split: Literal["train", "val", "test"] = "val"
    """Which part of the data."""
    batch_size: int = option(32, "-b")
    """Images in a batch, per process."""
    workers: int | None = option(None, "-j", "--num-workers")
    """Loader processes per process (default: from cores and processes)."""
    threads: int | None = None
    """CPU threads per process (default: cores divided by the processes of this machine)."""
    output_dir: str | None = option(None, "-o", "--output")
    """Where to write (default: eval/<split>, or eval/<data>-<split> for other data, in the run folder)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder or a checkpoint"
        elif self.run.endswith(".safetensors") and self.data is None:
            yield "DATA is missing: a checkpoint alone does not know where images are"
        if self.run is not None and self.run.endswith(".safetensors") and self.output_dir is None:
            yield "--output-dir is missing: a checkpoint alone has no run folder to write to"
        yield from out_of_range(self, 1, math.inf, "batch_size", "threads")
        yield from out_of_range(self, 0, 1024, "workers")


def main(cfg: Config) -> int:
    """Evaluate, print and write. Returns the exit code."""
    from resnet_dist import launcher
    from resnet_dist.data.loader import EvalImages, EvalLoader, default_workers
    from resnet_dist.data.transforms import ToInput
    from resnet_dist.distributed import on_main, start
    from resnet_dist.evaluate.records import evaluate
    from resnet_dist.report.evaluation import write_evaluation
    from resnet_dist.train.checkpoint import load_checkpoint
    from resnet_dist.train.progress import Display

    accelerator, _ = start(SystemConfig(mixed_precision="no", threads=cfg.threads))
    run = Path(cfg.run or "")
    checkpoint = run if run.is_file() or run.suffix == ".safetensors" else run / "checkpoints" / "best.safetensors"
    model, description = on_main(accelerator, lambda: load_checkpoint(checkpoint))
    classes, spec = description.classes, description.preprocessing
    table = on_main(accelerator, lambda: find_table(cfg, run, classes))
    workers = default_workers(accelerator.device, launcher.local_world_size()) if cfg.workers is None else cfg.workers
    loader = EvalLoader(
        EvalImages(table, spec),
        cfg.batch_size,
        workers,
        pin_memory=accelerator.device.type == "cuda",
        world=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    model.to(accelerator.device)
    to_input = ToInput(spec, accelerator.device)
    records = evaluate(accelerator, model, loader, to_input, len(classes), full_precision=True)
    folder = output_folder(cfg, run)
    metrics = on_main(accelerator, lambda: write_evaluation(folder, folder, table, records, classes, spec))
    rows = [(name, f"{value:.4f}") for name, value in metrics.items()]
    Display(accelerator.is_main_process).table(
        f"{checkpoint}: {len(table)} {cfg.split} images, float32", [*rows, ("written to", str(folder))]
    )
    return 0


def find_table(cfg: Config, run: Path, classes: tuple[str, ...]) -> "ImageTable":
    """The images to evaluate. Raises DataError, UsageError."""
    from resnet_dist.data.index import read_part, read_run_part

    if cfg.data is not None:
        return read_part(Path(cfg.data), cfg.split, classes)
    return read_run_part(run, cfg.split, classes)


def output_folder(cfg: Config, run: Path) -> Path:
    """Where the evaluation is written."""
    if cfg.output_dir is not None:
        return Path(cfg.output_dir)
    return run / "eval" / (cfg.split if cfg.data is None else f"{Path(cfg.data).stem}-{cfg.split}")
