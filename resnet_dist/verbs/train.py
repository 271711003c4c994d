"""`resnet-dist train`: fine-tune a ResNet on a folder of images."""

import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config import TrainConfig
from resnet_dist.errors import Preempted, ResnetDistError
from resnet_dist.stop import StopRequested, StopRequests, stop_requests

if TYPE_CHECKING:
    from accelerate import Accelerator

    from resnet_dist.run_folder import RunFolder
    from resnet_dist.train.job import Blueprint
    from resnet_dist.train.progress import Display
    from resnet_dist.train.resume import Resumed

Config = TrainConfig


def main(cfg: TrainConfig) -> int:
    """Train, evaluate the best checkpoint, and write the run folder. Returns the exit code."""
    train(cfg)
    return 0


def train(cfg: TrainConfig) -> Path | None:
    """The whole job. Returns the run folder; None on a dry run. Raises ResnetDistError, recorded in run.json."""
    with stop_requests() as stop:  # from the first moment on, before torch is imported
        from resnet_dist.distributed import machine_errors, on_main, start
        from resnet_dist.run_folder import RunFolder
        from resnet_dist.train.job import draw
        from resnet_dist.train.progress import Display

        accelerator, line = start(cfg.system, cfg.run.seed, cfg.run.tracker)
        stop.connect()
        display = Display(accelerator.is_main_process)
        path, resuming = on_main(accelerator, lambda: where(cfg))
        run = RunFolder(path, active=accelerator.is_main_process)
        if resuming and on_main(accelerator, lambda: is_complete(path, cfg)):
            display.say(f"{path}: this run is complete; for more, give --epochs above {cfg.run.epochs}, or --init-from")
            return path
        overwrite = cfg.run.overwrite or cfg.run.resume == "auto"  # a run without a checkpoint begins anew
        if not resuming:
            on_main(accelerator, lambda: RunFolder.check(path, overwrite))
        blueprint = draw(accelerator, cfg)
        for text in (line, *blueprint.lines()):
            display.say(text)
        if cfg.run.dry_run:
            return None
        resumed = None
        if resuming:
            resumed = reopen(accelerator, run, blueprint, display)
        else:
            on_main(accelerator, lambda: open_run(path, blueprint, overwrite))
        display.log_to(path / "train.log")
        try:
            with machine_errors(accelerator, blueprint.cfg.data.batch_size, blueprint.cfg.optim.grad_accum):
                _train_and_report(accelerator, blueprint, run, display, stop, resumed)
        except BaseException as error:
            record_end(run, error)
            raise
        stop.finish()
        accelerator.end_training()
        return path


def record_end(run: "RunFolder", error: BaseException) -> None:
    """Write into run.json why the run ended, on whichever process it was noticed first."""
    if isinstance(error, Preempted):
        run.update(status="preempted", exit_code=error.exit_code, reason=str(error))
    else:
        code = error.exit_code if isinstance(error, ResnetDistError) else 1
        run.end("failed", code, str(error) or type(error).__name__)


def where(cfg: TrainConfig) -> tuple[Path, bool]:
    """The run folder, and whether the run that it holds is to go on."""
    if cfg.run.resume is not None and cfg.run.resume != "auto":
        return Path(cfg.run.resume), True
    name = f"{cfg.model.model}-{cfg.recipe or 'train'}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(cfg.run.output_dir or f"runs/{name}")
    return path, cfg.run.resume == "auto" and has_state(path)


def has_state(path: Path) -> bool:
    """Whether a run folder holds something to go on from; one that ended before its first checkpoint does not."""
    return (path / "run.json").exists() and any((path / "checkpoints").glob("step-*"))


def is_complete(path: Path, cfg: TrainConfig) -> bool:
    """Whether the run is done, and no more epochs are asked for than it was to have."""
    from resnet_dist.run_folder import read_facts

    facts = read_facts(path)
    return facts.get("status") == "done" and cfg.run.epochs <= facts.get("epochs", 0)


def reopen(accelerator: "Accelerator", run: "RunFolder", blueprint: "Blueprint", display: "Display") -> "Resumed":
    """The state to go on from, once it is clear that it is the same run. Raises UsageError, ArtifactError."""
    from resnet_dist.distributed import on_main
    from resnet_dist.options import to_toml
    from resnet_dist.train.resume import changes, read_resumed

    resumed, warnings = read_resumed(accelerator, run)
    fingerprint, share = blueprint.index.fingerprint(), blueprint.batches.share
    lines = on_main(accelerator, lambda: changes(resumed, blueprint.cfg, fingerprint, share.global_batch))
    for line in (*warnings, *(f"changed: {line}" for line in lines)):
        display.say(line)
    state = resumed.state
    display.say(f"resuming {run.path} in epoch {state.epochs_done + 1} after {state.steps_done} optimizer steps")
    run.cut_back(state.steps_done)
    run.write("config.toml", to_toml(blueprint.cfg))
    run.update(status="running", exit_code=None, reason="", epochs=blueprint.cfg.run.epochs)
    return resumed


def open_run(path: Path, blueprint: "Blueprint", overwrite: bool) -> None:
    """Make the run folder and write down all that is known before training. On the main process."""
    from resnet_dist.data.index import write_manifest
    from resnet_dist.model.resnet import empty
    from resnet_dist.options import to_toml
    from resnet_dist.run_folder import RunFolder, to_json

    cfg, index = blueprint.cfg, blueprint.index
    weights = sum(p.numel() * p.element_size() for p in empty(blueprint.architecture).parameters())
    # The best checkpoint, its successor while it is written, and the checkpoints to resume from: weights, two
    # moments of an Adam and an average in each.
    needed = weights * (2 + 4 * (cfg.run.keep_last + 1))
    run = RunFolder.create(path, overwrite, needed)
    run.update(
        status="running",
        exit_code=None,
        reason="",
        epochs=cfg.run.epochs,
        data_root=str(index.root.absolute()),
        classes=len(index.classes),
        images={split: len(index.part(split)) for split in ("train", "val", "test")},
        versions={name: version(name) for name in ("resnet-dist", "torch", "torchvision", "accelerate", "pillow")},
    )
    run.write("command.txt", shlex.join(["resnet-dist", *sys.argv[1:]]) + "\n")
    run.write("config.toml", to_toml(cfg))
    run.write("classes.txt", "".join(f"{name}\n" for name in index.classes))
    run.write("preprocess.json", to_json(blueprint.spec.to_dict()))
    write_manifest(path / "data" / "manifest.csv", index)
    if blueprint.bad_images:
        run.write("bad_images.txt", "".join(f"{f.path}\t{f.error}\n" for f in blueprint.bad_images))


def _train_and_report(
    accelerator: "Accelerator",
    blueprint: "Blueprint",
    run: "RunFolder",
    display: "Display",
    stop: "StopRequests",
    resumed: "Resumed | None",
) -> None:
    from resnet_dist.distributed import on_main, start_trackers
    from resnet_dist.options import kept
    from resnet_dist.report.training import finish, plot_samples
    from resnet_dist.train.job import build_job
    from resnet_dist.train.loop import train as train_phases
    from resnet_dist.train.resume import restore_model

    start_trackers(accelerator, run.path / "tracker", kept(blueprint.cfg))
    job = build_job(accelerator, blueprint, run, display, stop)
    if resumed is None:
        file = run.plots / "samples_train.png"
        on_main(accelerator, lambda: plot_samples(file, job.train_loader.images, job.index.classes, job.spec))
    else:
        restore_model(resumed, job)
    state = train_phases(job, resumed)
    try:
        metrics = finish(job, state)
    except StopRequested:
        raise Preempted(
            "stopped by a signal while the best checkpoint was evaluated; resume to do that again"
        ) from None
    rows = [(name, f"{value:.4f}") for name, value in metrics.items()]
    rows = [("run folder", str(run.path)), ("best checkpoint", str(run.best)), *rows]
    rows.append(("best epoch", f"{state.best.epoch} of {state.epochs_done}" if state.best else "none"))
    rows.append(("stopped by", state.stopped_by or "the last epoch"))
    rows.append(("minutes", f"{state.elapsed() / 60:.1f}"))
    display.table(f"{len(job.index.val)} validation images, float32", rows)
