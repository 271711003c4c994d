"""`resnet-dist train`: fine-tune a ResNet on a folder of images."""

import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config import TrainConfig
from resnet_dist.errors import ResnetDistError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from resnet_dist.run_folder import RunFolder
    from resnet_dist.train.job import Blueprint
    from resnet_dist.train.progress import Display


Config = TrainConfig


def main(cfg: TrainConfig) -> int:
    """Train, evaluate the best checkpoint, and write the run folder. Returns the exit code."""
    train(cfg)
    return 0


def train(cfg: TrainConfig) -> Path | None:
    """The whole job. Returns the run folder; None on a dry run. Raises ResnetDistError, recorded in run.json."""
    from resnet_dist.distributed import on_main, start
    from resnet_dist.run_folder import RunFolder
    from resnet_dist.train.job import draw
    from resnet_dist.train.progress import Display

    accelerator = start(cfg.run.threads, cfg.run.seed, cfg.run.deterministic)
    display = Display(accelerator.is_main_process)
    path = Path(cfg.run.output_dir or f"runs/{cfg.model.model}-{cfg.recipe or 'train'}-{time.strftime('%Y%m%d-%H%M%S')}")
    on_main(accelerator, lambda: RunFolder.check(path, cfg.run.overwrite))
    blueprint = draw(accelerator, cfg)
    for line in blueprint.lines():
        display.say(line)
    if cfg.run.dry_run:
        return None
    on_main(accelerator, lambda: open_run(path, blueprint))
    display.log_to(path / "train.log")
    run = RunFolder(path, active=accelerator.is_main_process)
    try:
        _train_and_report(accelerator, blueprint, run, display)
    except BaseException as error:
        code = error.exit_code if isinstance(error, ResnetDistError) else 1
        run.update(status="failed", exit_code=code, reason=str(error) or type(error).__name__)
        raise
    return path


def open_run(path: Path, blueprint: "Blueprint") -> None:
    """Make the run folder and write down all that is known before training. On the main process."""
    from resnet_dist.data.index import write_manifest
    from resnet_dist.model.resnet import empty
    from resnet_dist.options import to_toml
    from resnet_dist.run_folder import RunFolder, to_json

    weights = sum(p.numel() * p.element_size() for p in empty(blueprint.architecture).parameters())
    run = RunFolder.create(path, blueprint.cfg.run.overwrite, needed_bytes=2 * weights + (64 << 20))
    index = blueprint.index
    run.update(
        status="running",
        data_root=str(index.root.absolute()),
        classes=len(index.classes),
        images={split: len(index.part(split)) for split in ("train", "val", "test")},
        versions={name: version(name) for name in ("resnet-dist", "torch", "torchvision", "accelerate", "pillow")},
    )
    run.write("command.txt", shlex.join(["resnet-dist", *sys.argv[1:]]) + "\n")
    run.write("config.toml", to_toml(blueprint.cfg))
    run.write("classes.txt", "".join(f"{name}\n" for name in index.classes))
    run.write("preprocess.json", to_json(blueprint.spec.to_dict()))
    write_manifest(path / "data" / "manifest.csv", index)


def _train_and_report(
    accelerator: "Accelerator", blueprint: "Blueprint", run: "RunFolder", display: "Display"
) -> None:
    from resnet_dist.distributed import on_main
    from resnet_dist.report.training import finish, plot_samples
    from resnet_dist.train.job import build_job
    from resnet_dist.train.loop import train as train_phases

    started = time.monotonic()
    job = build_job(accelerator, blueprint, run, display)
    samples = run.plots / "samples_train.png"
    on_main(accelerator, lambda: plot_samples(samples, job.train_loader.images, job.index.classes, job.spec))
    state = train_phases(job)
    metrics = finish(job, state)
    rows = [(name, f"{value:.4f}") for name, value in metrics.items()]
    rows = [("run folder", str(run.path)), ("best checkpoint", str(run.best)), *rows]
    rows.append(("best epoch", f"{state.best.epoch} of {state.epochs_done}" if state.best else "none"))
    rows.append(("stopped by", state.stopped_by or "the last epoch"))
    rows.append(("minutes", f"{(time.monotonic() - started) / 60:.1f}"))
    display.table(f"{len(job.index.val)} validation images, float32", rows)
