"""The run folder of a training: choose, lock, create or reopen it, and record why the run ended."""

import shlex
import sys
import time
from pathlib import Path

from accelerate import Accelerator

from resnet_dist.config.schema import TrainConfig
from resnet_dist.config.stored import to_toml
from resnet_dist.data.index import write_manifest
from resnet_dist.errors import Preempted, ResnetDistError, UsageError
from resnet_dist.files.run import Replace, RunFolder, has_state, is_run, read_facts, to_json
from resnet_dist.model.resnet import empty
from resnet_dist.runtime import environment
from resnet_dist.runtime.accelerate import on_main
from resnet_dist.runtime.display import Display
from resnet_dist.runtime.signals import Stopped
from resnet_dist.runtime.wording import counted, one_line
from resnet_dist.training.facts import this_launch, what_is_trained
from resnet_dist.training.plan import Plan
from resnet_dist.training.resume import Resumed, changes, read_resumed


def typed_command() -> str:
    """The command line of this process, as it is recorded with the run."""
    return shlex.join(["resnet-dist", *sys.argv[1:]])


def how_to_resume(started_by: str, path: Path, cfg: TrainConfig) -> str:
    """The command that continues the run in a folder, quoted for the shell; the call if the run was started in Python.

    `started_by`: the recorded command. `compare` and `reproduce` continue if they are repeated. Under a launcher, the
    launcher's part of the command is left to the user.
    """
    if started_by.startswith("resnet_dist."):
        transform = ", train_transform=..." if cfg.augment.aug == "custom" else ""
        return f"`resnet_dist.train(resume={str(path)!r}{transform})`"
    if started_by.startswith(("resnet-dist compare ", "resnet-dist reproduce ")):
        return f"`{started_by}`"
    if environment.is_distributed():
        return f"`{shlex.join(['train', '--resume', str(path)])}` under the same launcher"
    return f"`{shlex.join(['resnet-dist', 'train', '--resume', str(path)])}`"


def folder_of(cfg: TrainConfig) -> Path:
    """The run folder that the config names, or a new one below runs/."""
    if cfg.run.resume is not None and cfg.run.resume != "auto":
        return Path(cfg.run.resume)
    name = f"{cfg.model.model}-{cfg.recipe or 'train'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(cfg.run.output_dir or f"runs/{name}")


def claim(run: RunFolder, cfg: TrainConfig) -> bool:
    """Lock the folder if it holds a run; returns whether that run is resumed. On the main process.

    Raises UsageError or MachineError if resuming it, or starting a run there, is impossible.
    """
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


def may_replace(cfg: TrainConfig) -> Replace:
    """Which run in the folder a new run may replace; `--resume auto` replaces one that has no checkpoint yet."""
    if cfg.run.overwrite:
        return "any"
    return "unfinished" if cfg.run.resume == "auto" else "nothing"


def is_complete(path: Path, cfg: TrainConfig) -> bool:
    """Whether the run to resume is done and no more epochs are asked for than it has.

    Raises UsageError if more are asked for and it has no checkpoint to resume from.
    """
    if cfg.run.resume is None or (cfg.run.resume == "auto" and not is_run(path)):
        return False
    facts = read_facts(path)
    if facts.get("status") != "done":
        return False
    epochs: int = facts.get("epochs", 0)
    if cfg.run.epochs > epochs and not has_state(path):
        raise UsageError(
            f"--resume {path}: this run is complete after {counted(epochs, 'epoch')} and has no checkpoint to continue "
            "from; start a new run with --init-from"
        )
    return cfg.run.epochs <= epochs


def completeness(path: Path) -> str:
    """The line that is shown for a run that is complete."""
    epochs = read_facts(path)["epochs"]
    return (
        f"{path}: this run is complete after {counted(epochs, 'epoch')}; to train more, give --epochs above {epochs}, "
        "or --init-from"
    )


def open_run(run: RunFolder, plan: Plan, replace: Replace, command: str) -> None:
    """Create the run folder and write what is known before training. On the main process."""
    cfg, index = plan.cfg, plan.index
    weights = sum(p.numel() * p.element_size() for p in empty(plan.architecture).parameters())
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
        **what_is_trained(plan),
        "launches": [this_launch(command)],
    }
    run.create(replace, needed, facts)
    run.write("command.txt", command + "\n")
    run.write("config.toml", to_toml(cfg))
    run.write("classes.txt", "".join(f"{one_line(name)}\n" for name in index.classes))
    run.write("preprocess.json", to_json(plan.spec.to_dict()))
    write_manifest(run.path / "data" / "manifest.csv", index)
    if plan.bad_images:
        run.write("bad_images.txt", "".join(f"{f.path}\t{f.error}\n" for f in plan.bad_images))


def reopen(accelerator: Accelerator, run: RunFolder, plan: Plan, display: Display, command: str) -> Resumed:
    """Read the newest checkpoint and check that it is of the same run. Raises UsageError, ArtifactError."""
    resumed, warnings = read_resumed(accelerator, run)
    fingerprint, share = plan.index.fingerprint(), plan.share
    lines = on_main(accelerator, lambda: changes(run.path, resumed, plan.cfg, fingerprint, share.global_batch))
    for line in (*warnings, *(f"changed: {line}" for line in lines)):
        display.say(line)
    state = resumed.state
    display.say(
        f"resuming {run.path} in epoch {state.epochs_done + 1} after {counted(state.steps_done, 'optimizer step')}"
    )
    if on_main(accelerator, lambda: write_reopened(run, plan, state.steps_done, state.epochs_done, command)):
        state.stopped_by = None  # the run was done and gets more epochs
    return resumed


def write_reopened(run: RunFolder, plan: Plan, steps: int, epochs: int, command: str) -> bool:
    """Record that the run continues after `steps` steps and `epochs` epochs; returns whether it was done before."""
    facts = read_facts(run.path)
    was_done: bool = facts.get("status") == "done"
    run.cut_back(steps, epochs)
    run.write("config.toml", to_toml(plan.cfg))
    launches = [*facts.get("launches", []), this_launch(command)]
    began = {"status": "running", "exit_code": None, "reason": "", "directory": str(Path.cwd())}
    run.update(**began, epochs=plan.cfg.run.epochs, launches=launches)
    return was_done


def record_end(accelerator: Accelerator, run: RunFolder, error: BaseException) -> None:
    """Write into run.json why the run ended, on the process that noticed it first.

    If all stop by request, no process leaves before it is written: the launcher would end the others.
    """
    if isinstance(error, Stopped) or not run.is_open:
        return  # a stop is recorded where it is caught; a refused run leaves the record of an earlier launch as it is
    if isinstance(error, Preempted):
        facts = {"status": "preempted", "exit_code": error.exit_code, "reason": str(error)}
        on_main(accelerator, lambda: run.update(**facts))
    else:
        code = error.exit_code if isinstance(error, ResnetDistError) else 1
        run.end("failed", code, str(error) or type(error).__name__)


def record_stop(run: RunFolder, code: int, reason: str, resuming: bool) -> None:
    """If run.json says "running", record there that a signal ended the run before it trained.

    A run that was being resumed has a checkpoint, so it can be resumed again.
    """
    if (run.path / "run.json").exists():
        status, code = ("preempted", Preempted.exit_code) if resuming else ("failed", code)
        run.end(status, code, reason)
