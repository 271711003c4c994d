"""Train: from a config to a finished run folder. `resnet-dist train` and `resnet_dist.train` call this."""

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from resnet_dist.config.layers import from_keywords, keyword_signature
from resnet_dist.config.schema import AugmentConfig, TrainConfig
from resnet_dist.errors import Preempted, UsageError, python_errors
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.signals import Stopped, StopRequested, StopRequests, stop_requests
from resnet_dist.training.result import Run, load_run

if TYPE_CHECKING:
    from accelerate import Accelerator

    from resnet_dist.data.transforms import Transform
    from resnet_dist.evaluation.metrics import Measured
    from resnet_dist.files.run import RunFolder
    from resnet_dist.runtime.display import Display
    from resnet_dist.training.job import Job
    from resnet_dist.training.plan import Plan
    from resnet_dist.training.resume import Resumed
    from resnet_dist.training.state import State


def train(
    data: str | os.PathLike[str] | None = None,
    *,
    train_transform: "Transform | None" = None,
    verbose: bool = False,
    **settings: Any,
) -> Run | None:
    """Fine-tune a ResNet on a folder of images (or a CSV manifest) and return the finished run.

    The keywords are the options of `resnet-dist train`, with underscores: `train("photos", model="resnet50",
    recipe="discriminative", epochs=10, batch_size=32, output_dir="runs/photos")`. `phase` takes a list of dicts, or
    texts such as "2.lr_scale=0.1". `data` may be left out with `resume=`, which also returns a run that is done
    already. `dry_run=True` checks everything, trains nothing and returns None. With `verbose` the plan and the progress
    are printed; train.log in the run folder always has them.

    `train_transform` takes the place of the random crop, flip and colours (`aug` and its options) on the training
    images: a torchvision v2 transform or any callable that takes the whole image as a uint8 tensor (3, H, W), RGB, and
    returns a uint8 tensor (3, img_size, img_size). It runs in the loader processes. Before each image torch, numpy and
    Python are seeded by (seed, random_stream, epoch, image), so that neither workers nor processes nor resuming change
    what it draws from these. Normalisation, mixup and cutmix follow as always. run.json and the checkpoint record that
    it was used; a run with one is resumed with `train(resume=..., train_transform=...)`.

    Works in a script, in a notebook, in every process under `accelerate launch`, and in a function that is given to
    `accelerate.notebook_launcher`. In the main thread, a signal such as Ctrl-C saves a checkpoint and raises Preempted
    (before the first step: KeyboardInterrupt); other threads handle no signals. Raises UsageError, which lists all
    problems and names keywords, DataError, MachineError, NonFiniteError or ArtifactError.
    """
    given = {"data": data, **settings}
    with python_errors():
        cfg = from_keywords(TrainConfig, with_transform(given, train_transform))
        command = as_call("train", given)
        return run_training(cfg, train_transform=train_transform, verbose=verbose, command=command)


train.__signature__ = keyword_signature(TrainConfig, train_transform=None, verbose=False)  # type: ignore[attr-defined]


def with_transform(given: Mapping[str, Any], train_transform: "Transform | None") -> dict[str, Any]:
    """The keywords, with `aug="custom"` if there is a transform. Raises UsageError for settings that it replaces."""
    if train_transform is None:
        return dict(given)
    if not callable(train_transform):
        raise UsageError(f"train_transform={train_transform!r}: must be callable")
    replaced = {field.name for field in dataclasses.fields(AugmentConfig)} - {"mixup", "cutmix", "scaled_decode"}
    typed = sorted(replaced & {name for name, value in given.items() if value not in (None, "custom")})
    if typed:
        raise UsageError([f"--{name.replace('_', '-')}: train_transform replaces it, leave it out" for name in typed])
    return {**given, "aug": "custom"}


def as_call(name: str, given: Mapping[str, Any]) -> str:
    """A call of the Python API as text, for the record of a run."""
    shown = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in given.items() if v is not None}
    return f"resnet_dist.{name}({', '.join(f'{n}={v!r}' for n, v in shown.items())})"


def run_training(
    cfg: TrainConfig,
    *,
    train_transform: "Transform | None" = None,
    verbose: bool = True,
    command: str | None = None,
) -> Run | None:
    """Train, evaluate the best checkpoint and write the run folder. Returns the run; None on a dry run.

    Every process of a launch must call this. `command` is recorded with the run as what started it (default: the
    command line of this process). Raises ResnetDistError, and records the reason in run.json.
    """
    with stop_requests() as stop:  # from the first moment, before torch is imported
        from resnet_dist.runtime.display import Display

        display = Display(launcher.rank() == 0, verbose)
        with display.busy("importing torch"):
            from resnet_dist.config.stored import kept
            from resnet_dist.data.loader import close_loaders
            from resnet_dist.files.run import RunFolder
            from resnet_dist.runtime.accelerate import compare_settings, on_main, start
            from resnet_dist.runtime.faults import machine_errors
            from resnet_dist.runtime.isolation import process_settings_restored
            from resnet_dist.training import folder

        with process_settings_restored():
            with display.busy("starting"):
                accelerator, line = start(cfg.system, cfg.run.seed, cfg.run.tracker)
            with machine_errors(accelerator):
                stop.connect(cfg.system.dist_timeout)
                compare_settings(accelerator, kept(cfg))
            path = on_main(accelerator, lambda: folder.folder_of(cfg))
            run = RunFolder(path, active=accelerator.is_main_process)
            if on_main(accelerator, lambda: folder.is_complete(path, cfg)):
                display.say(on_main(accelerator, lambda: folder.completeness(path)))
                return on_main(accelerator, lambda: load_run(path))
            try:
                resuming = on_main(accelerator, lambda: folder.claim(run, cfg))
                if not cfg.run.dry_run:  # it holds no lock, and the run in the folder may belong to another process
                    stop.on_exit = lambda code, reason: folder.record_stop(run, code, reason, resuming)
                    resume = folder.how_to_resume(command or folder.typed_command(), path, cfg)
                    stop.last_words = f"\nstopped without saving; if a checkpoint is there, continue with {resume}\n"
                display.say(line)
                session = Session(accelerator, run, display, stop, command or folder.typed_command())
                return _train(session, cfg, resuming, train_transform)
            except Stopped as stopped:
                if stop.on_exit is not None:
                    stop.on_exit(128 + stopped.number, str(stopped))
                    if resuming:
                        error = Preempted(f"{stopped}; the last checkpoint is untouched")
                        raise _with_command(error, command or folder.typed_command(), run, cfg) from None
                raise
            finally:
                close_loaders()
                run.unlock()


@dataclasses.dataclass(frozen=True)
class Session:
    """What a process works with, whatever it trains: its accelerator, the run folder, the display and stop requests."""

    accelerator: "Accelerator"
    run: "RunFolder"
    display: "Display"
    stop: StopRequests
    command: str


def _train(session: Session, cfg: TrainConfig, resuming: bool, train_transform: "Transform | None") -> Run | None:
    from resnet_dist.runtime.accelerate import on_main
    from resnet_dist.runtime.faults import machine_errors
    from resnet_dist.training import folder
    from resnet_dist.training.job import check_weights
    from resnet_dist.training.plan import make_plan

    accelerator, run, display = session.accelerator, session.run, session.display
    with display.busy("reading the list of images and planning"):
        plan = make_plan(accelerator, cfg, train_transform)
    if not resuming:
        on_main(accelerator, lambda: check_weights(plan))
    for text in plan.lines():
        display.say(text)
    if cfg.run.dry_run:
        return None
    if cfg.system.autotune:
        accelerator, plan = _tuned(accelerator, plan, display)
        session = dataclasses.replace(session, accelerator=accelerator)
    resumed = None
    try:
        if resuming:
            resumed = folder.reopen(accelerator, run, plan, display, session.command)
        else:
            on_main(accelerator, lambda: folder.open_run(run, plan, folder.may_replace(cfg), session.command))
        run.is_open = True  # on every process
        display.log_to(run.path / "train.log")
        with machine_errors(accelerator, plan.share.batch_size, plan.share.accumulate):
            metrics = _train_and_report(session, plan, resumed)
            session.stop.finish()
    except BaseException as error:
        folder.record_end(accelerator, run, error)
        if isinstance(error, Preempted):
            raise _with_command(error, session.command, run, cfg) from None
        raise
    for tracker in accelerator.trackers:
        tracker.finish()
    return Run(run.path, metrics)


def _with_command(error: Preempted, started_by: str, run: "RunFolder", cfg: TrainConfig) -> Preempted:
    """The error with the command that continues the run."""
    from resnet_dist.training.folder import how_to_resume

    return Preempted(f"{error}; continue with {how_to_resume(started_by, run.path, cfg)}")


def _tuned(accelerator: "Accelerator", plan: "Plan", display: "Display") -> tuple["Accelerator", "Plan"]:
    """The plan with the settings that a trial on this machine measured as fastest, and an accelerator for them."""
    from resnet_dist.runtime.accelerate import start
    from resnet_dist.training.autotune import autotune

    with display.busy("measuring which settings are fastest"):
        plan, lines = autotune(accelerator, plan)
    accelerator, line = start(plan.cfg.system, plan.cfg.run.seed, plan.cfg.run.tracker)
    for text in (*lines, line):
        display.say(text)
    return accelerator, plan


def _train_and_report(session: Session, plan: "Plan", resumed: "Resumed | None") -> "Mapping[str, Measured]":
    from resnet_dist.config.stored import kept
    from resnet_dist.runtime.accelerate import on_main, start_trackers
    from resnet_dist.runtime.machine import forget_peak_memory
    from resnet_dist.training.facts import largest_peak_memory
    from resnet_dist.training.finish import finish
    from resnet_dist.training.job import build_job
    from resnet_dist.training.loop import train as train_phases
    from resnet_dist.training.resume import restore_model

    accelerator, run = session.accelerator, session.run
    forget_peak_memory()
    start_trackers(accelerator, run.path / "tracker", kept(plan.cfg))
    with session.display.busy("loading weights and images"):
        job = build_job(accelerator, plan, run, session.display, session.stop, resumed is not None)
        if resumed is not None:
            restore_model(resumed, job)
        elif plan.cfg.run.report:
            on_main(accelerator, lambda: _plot_samples(job))
    state = train_phases(job, resumed)
    peak = largest_peak_memory(accelerator)
    run.update(seconds=round(state.elapsed(), 3), peak_memory=peak)
    try:
        metrics = finish(job, state)
    except StopRequested:
        raise Preempted(
            "stopped by a signal while the best checkpoint was evaluated; resume to do that again"
        ) from None
    if accelerator.is_main_process:
        session.display.table(f"{len(job.plan.index.val)} validation images, float32", summary(job, state, metrics))
    return metrics


def _plot_samples(job: "Job") -> None:
    from resnet_dist.report import plots
    from resnet_dist.training.finish import first_samples

    images, titles = first_samples(job.train_images, job.plan.index.classes, job.plan.spec)
    plots.image_grid(job.run.plots / "samples_train.png", images, titles)


def summary(job: "Job", state: "State", metrics: "Mapping[str, Measured]") -> list[tuple[str, str]]:
    """The rows of the table at the end of a training, on the main process."""
    from resnet_dist.files.run import identity, read_facts

    run = job.run
    rows = [("run folder", str(run.path))]
    if job.plan.cfg.run.report:
        rows.append(("report", str(run.path / "report.html")))
    rows.append(("trained", identity(read_facts(run.path))))
    rows += [(name, str(metric)) for name, metric in metrics.items()]
    rows.append(("best checkpoint", str(run.best)))
    rows.append(("best epoch", f"{state.best.epoch} of {state.epochs_done}" if state.best else "none"))
    rows.append(("stopped by", state.stopped_by or "the last epoch"))
    rows.append(("minutes", f"{state.elapsed() / 60:.1f}"))
    return rows
