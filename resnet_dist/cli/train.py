"""`resnet-dist train`: fine-tune a ResNet on a folder of images."""

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config.schema import TrainConfig
from resnet_dist.errors import Preempted, ResnetDistError, UsageError
from resnet_dist.runtime.signals import Stopped, StopRequested, StopRequests, stop_requests

if TYPE_CHECKING:
    from accelerate import Accelerator

    from resnet_dist.files.run import Replace, RunFolder
    from resnet_dist.runtime.display import Display
    from resnet_dist.training.job import Blueprint
    from resnet_dist.training.resume import Resumed

Config = TrainConfig


def main(cfg: TrainConfig) -> int:
    """Train, evaluate the best checkpoint, and write the run folder. Returns the exit code."""
    train(cfg)
    return 0


def train(cfg: TrainConfig) -> Path | None:
    """The whole job. Returns the run folder; None on a dry run. Raises ResnetDistError, recorded in run.json."""
    with stop_requests() as stop:  # from the first moment on, before torch is imported
        from resnet_dist.data.loader import close_loaders
        from resnet_dist.files.run import RunFolder
        from resnet_dist.runtime.accelerate import on_main, start
        from resnet_dist.runtime.display import Display
        from resnet_dist.runtime.faults import machine_errors

        accelerator, line = start(cfg.system, cfg.run.seed, cfg.run.tracker)
        with machine_errors(accelerator):
            stop.connect(cfg.system.dist_timeout)
        display = Display(accelerator.is_main_process)
        path = on_main(accelerator, lambda: where(cfg))
        run = RunFolder(path, active=accelerator.is_main_process)
        if on_main(accelerator, lambda: is_complete(path, cfg)):
            display.say(on_main(accelerator, lambda: completeness(path)))
            return path
        try:
            resuming = on_main(accelerator, lambda: claim(run, cfg))
            if not cfg.run.dry_run:  # that holds no lock: what it would record may be another process's run
                stop.on_exit = lambda code, reason: record_stop(run, code, reason, resuming)
            display.say(line)
            return _train_in(accelerator, cfg, run, resuming, display, stop)
        except Stopped as stopped:
            if stop.on_exit is not None:
                stop.on_exit(128 + stopped.number, str(stopped))
                if resuming:
                    raise Preempted(f"{stopped}; the last checkpoint is untouched") from None
            raise
        finally:
            close_loaders()
            run.unlock()


def _train_in(
    accelerator: "Accelerator",
    cfg: TrainConfig,
    run: "RunFolder",
    resuming: bool,
    display: "Display",
    stop: "StopRequests",
) -> Path | None:
    from resnet_dist.runtime.accelerate import on_main
    from resnet_dist.runtime.faults import machine_errors
    from resnet_dist.training.job import check_weights, draw

    blueprint = draw(accelerator, cfg)
    if not resuming:
        on_main(accelerator, lambda: check_weights(blueprint))
    for text in blueprint.lines():
        display.say(text)
    if cfg.run.dry_run:
        return None
    if cfg.system.autotune:
        accelerator, blueprint = _tuned(accelerator, blueprint, display)
    resumed = None
    try:
        if resuming:
            resumed = reopen(accelerator, run, blueprint, display)
        else:
            on_main(accelerator, lambda: open_run(run, blueprint, may_replace(cfg)))
        run.is_open = True  # on every process
        display.log_to(run.path / "train.log")
        with machine_errors(accelerator, blueprint.cfg.data.batch_size, blueprint.cfg.optim.grad_accum):
            _train_and_report(accelerator, blueprint, run, display, stop, resumed)
            stop.finish()
    except BaseException as error:
        record_end(accelerator, run, error)
        raise
    accelerator.end_training()
    return run.path


def _tuned(accelerator: "Accelerator", blueprint: "Blueprint", display: "Display") -> tuple["Accelerator", "Blueprint"]:
    """What a trial on this machine finds to be fastest, in force."""
    from resnet_dist.runtime.accelerate import start
    from resnet_dist.training.autotune import autotune

    cfg, lines = autotune(accelerator, blueprint)
    accelerator, line = start(cfg.system, cfg.run.seed, cfg.run.tracker)
    for text in (*lines, line):
        display.say(text)
    return accelerator, dataclasses.replace(blueprint, cfg=cfg)


def record_end(accelerator: "Accelerator", run: "RunFolder", error: BaseException) -> None:
    """Write into run.json why the run ended, on whichever process it was noticed first.

    Where all stop by request nobody leaves before it is written: the launcher would end the others.
    """
    from resnet_dist.runtime.accelerate import on_main

    if isinstance(error, Stopped) or not run.is_open:
        return  # recorded by who catches it; or refused, and what the folder says of an earlier launch stays true
    if isinstance(error, Preempted):
        facts = {"status": "preempted", "exit_code": error.exit_code, "reason": str(error)}
        on_main(accelerator, lambda: run.update(**facts))
    else:
        code = error.exit_code if isinstance(error, ResnetDistError) else 1
        run.end("failed", code, str(error) or type(error).__name__)


def record_stop(run: "RunFolder", code: int, reason: str, resuming: bool) -> None:
    """Write into run.json, if it says "running", that a signal ended the run before it trained.

    A run that resumes has a checkpoint, so that it can be resumed again.
    """
    if (run.path / "run.json").exists():
        status, code = ("preempted", Preempted.exit_code) if resuming else ("failed", code)
        run.end(status, code, reason)


def where(cfg: TrainConfig) -> Path:
    """The run folder."""
    if cfg.run.resume is not None and cfg.run.resume != "auto":
        return Path(cfg.run.resume)
    name = f"{cfg.model.model}-{cfg.recipe or 'train'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(cfg.run.output_dir or f"runs/{name}")


def claim(run: "RunFolder", cfg: TrainConfig) -> bool:
    """Whether the run that the folder holds goes on, now that no other process writes it. On the main process.

    Raises UsageError or MachineError where that, or beginning a run there, is impossible.
    """
    from resnet_dist.files.run import has_state, is_run, read_facts

    if cfg.run.resume not in (None, "auto"):
        read_facts(run.path)
        if not is_run(run.path):
            raise UsageError(f"--resume {run.path}: its run.json is not that of a run")
    holds_run = is_run(run.path)
    if holds_run and not cfg.run.dry_run:
        run.lock()
    resuming = cfg.run.resume is not None and (cfg.run.resume != "auto" or (holds_run and has_state(run.path)))
    if resuming:
        run.check_links()
    else:
        run.check(may_replace(cfg))
    return resuming


def may_replace(cfg: TrainConfig) -> "Replace":
    """Which run that does not go on may be replaced; `--resume auto` replaces one that has no checkpoint yet."""
    if cfg.run.overwrite:
        return "any"
    return "unfinished" if cfg.run.resume == "auto" else "nothing"


def is_complete(path: Path, cfg: TrainConfig) -> bool:
    """Whether the run that is to go on is done, and no more epochs are asked for than it was to have.

    Raises UsageError where more are asked for and it keeps no checkpoint to go on from.
    """
    from resnet_dist.files.run import has_state, is_run, read_facts

    if cfg.run.resume is None or (cfg.run.resume == "auto" and not is_run(path)):
        return False
    facts = read_facts(path)
    if facts.get("status") != "done":
        return False
    epochs: int = facts.get("epochs", 0)
    if cfg.run.epochs > epochs and not has_state(path):
        raise UsageError(
            f"--resume {path}: this run is complete with {epochs} epochs and keeps no checkpoint to give it more from; "
            "start a new run with --init-from"
        )
    return cfg.run.epochs <= epochs


def completeness(path: Path) -> str:
    """What is said of a run that is complete."""
    from resnet_dist.files.run import read_facts

    epochs = read_facts(path)["epochs"]
    return (
        f"{path}: this run is complete, it has {epochs} epochs; for more, give --epochs above {epochs}, or --init-from"
    )


def reopen(accelerator: "Accelerator", run: "RunFolder", blueprint: "Blueprint", display: "Display") -> "Resumed":
    """The state to go on from, once it is clear that it is the same run. Raises UsageError, ArtifactError."""
    from resnet_dist.runtime.accelerate import on_main
    from resnet_dist.training.resume import changes, read_resumed

    resumed, warnings = read_resumed(accelerator, run)
    fingerprint, share = blueprint.index.fingerprint(), blueprint.batches.share
    lines = on_main(accelerator, lambda: changes(resumed, blueprint.cfg, fingerprint, share.global_batch))
    for line in (*warnings, *(f"changed: {line}" for line in lines)):
        display.say(line)
    state = resumed.state
    display.say(f"resuming {run.path} in epoch {state.epochs_done + 1} after {state.steps_done} optimizer steps")
    if on_main(accelerator, lambda: write_reopened(run, blueprint, state.steps_done, state.epochs_done)):
        state.stopped_by = None  # it was done, and is given more epochs
    return resumed


def write_reopened(run: "RunFolder", blueprint: "Blueprint", steps: int, epochs: int) -> bool:
    """Let the run folder say that the run goes on after so many steps and epochs; returns whether it was done."""
    from resnet_dist.config.stored import to_toml
    from resnet_dist.files.run import read_facts
    from resnet_dist.training.facts import this_launch

    facts = read_facts(run.path)
    was_done: bool = facts.get("status") == "done"
    run.cut_back(steps, epochs)
    run.write("config.toml", to_toml(blueprint.cfg))
    launches = [*facts.get("launches", []), this_launch()]
    began = {"status": "running", "exit_code": None, "reason": "", "directory": str(Path.cwd())}
    run.update(**began, epochs=blueprint.cfg.run.epochs, launches=launches)
    return was_done


def open_run(run: "RunFolder", blueprint: "Blueprint", replace: "Replace") -> None:
    """Make the run folder and write down all that is known before training. On the main process."""
    from resnet_dist.config.stored import to_toml
    from resnet_dist.data.index import write_manifest
    from resnet_dist.files.run import to_json
    from resnet_dist.model.resnet import empty
    from resnet_dist.runtime.wording import one_line
    from resnet_dist.training.facts import this_launch, what_is_trained

    cfg, index = blueprint.cfg, blueprint.index
    weights = sum(p.numel() * p.element_size() for p in empty(blueprint.architecture).parameters())
    # The best checkpoint, its successor while it is written, and the checkpoints to resume from: weights, two
    # moments of an Adam and an average in each.
    needed = weights * (2 + 4 * (cfg.run.keep_last + 1))
    facts = {
        "status": "running",
        "exit_code": None,
        "reason": "",
        "epochs": cfg.run.epochs,
        "data_root": str(index.root.absolute()),
        "directory": str(Path.cwd()),  # where the relative paths of config.toml start
        "classes": len(index.classes),
        "images": {split: len(index.part(split)) for split in ("train", "val", "test")},
        **what_is_trained(blueprint),
        "launches": [this_launch()],
    }
    run.create(replace, needed, facts)
    run.write("command.txt", shlex.join(["resnet-dist", *sys.argv[1:]]) + "\n")
    run.write("config.toml", to_toml(cfg))
    run.write("classes.txt", "".join(f"{one_line(name)}\n" for name in index.classes))
    run.write("preprocess.json", to_json(blueprint.spec.to_dict()))
    write_manifest(run.path / "data" / "manifest.csv", index)
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
    from resnet_dist.config.stored import kept
    from resnet_dist.report.training import finish, plot_samples
    from resnet_dist.runtime.accelerate import on_main, start_trackers
    from resnet_dist.runtime.machine import forget_peak_memory
    from resnet_dist.training.facts import largest_peak_memory
    from resnet_dist.training.job import build_job
    from resnet_dist.training.loop import train as train_phases
    from resnet_dist.training.resume import restore_model

    forget_peak_memory()
    start_trackers(accelerator, run.path / "tracker", kept(blueprint.cfg))
    job = build_job(accelerator, blueprint, run, display, stop, resumed is not None)
    if resumed is not None:
        restore_model(resumed, job)
    elif blueprint.cfg.run.report:
        file = run.plots / "samples_train.png"
        on_main(accelerator, lambda: plot_samples(file, job.train_images, job.index.classes, job.spec))
    state = train_phases(job, resumed)
    peak = largest_peak_memory(accelerator)
    run.update(seconds=round(state.elapsed(), 3), peak_memory=peak)
    try:
        metrics = finish(job, state)
    except StopRequested:
        raise Preempted(
            "stopped by a signal while the best checkpoint was evaluated; resume to do that again"
        ) from None
    rows = [(name, str(metric)) for name, metric in metrics.items()]
    rows = [("run folder", str(run.path)), *rows]
    if blueprint.cfg.run.report:
        rows.insert(1, ("to look at", str(run.path / "report.html")))
    rows.append(("best checkpoint", str(run.best)))
    rows.append(("best epoch", f"{state.best.epoch} of {state.epochs_done}" if state.best else "none"))
    rows.append(("stopped by", state.stopped_by or "the last epoch"))
    rows.append(("minutes", f"{state.elapsed() / 60:.1f}"))
    display.table(f"{len(job.index.val)} validation images, float32", rows)
