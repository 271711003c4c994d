"""Resuming an interrupted run: what is saved, what is restored, and which settings may have changed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from resnet_dist.config.schema import TrainConfig
from resnet_dist.config.stored import PATHS, kept
from resnet_dist.errors import UsageError
from resnet_dist.files.run import RunFolder
from resnet_dist.model.batch_norm import running_statistics
from resnet_dist.runtime.accelerate import check_in_step, on_main, share_tensors
from resnet_dist.training.ema import Ema
from resnet_dist.training.job import Job
from resnet_dist.training.schedule import Schedule
from resnet_dist.training.state import (
    State,
    fitting,
    optimizer_tensors,
    read_newest_state,
    remove_leftovers,
    restore_optimizer,
    write_state,
)
from resnet_dist.training.tally import Tally

# Settings that a resumed run must keep, by section: they decide what the saved numbers mean.
FIXED = {
    "data": {
        "val_split",
        "split_seed",
        "group_by",
        "drop_last",
    },  # the location of the images may change: their fingerprint is compared
    "preprocess": None,  # all of them
    "model": {"model", "head", "head_hidden", "stem"},
    "run": {"seed", "random_stream", "ema", "init_from"},
    "phase": None,
}


@dataclass(frozen=True)
class Resumed:
    """A saved state: the progress of the run, its tensors and the other values saved with them."""

    state: State
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


def save_state(job: Job, optimizer: torch.optim.Optimizer, schedule: Schedule, tally: Tally, state: State) -> None:
    """Write a checkpoint to resume from. Every process must call this; the main one writes."""
    check_in_step(job.accelerator, job.model)
    tensors = {f"model/{name}": tensor for name, tensor in job.model.state_dict().items()}
    if job.ema is not None:
        tensors |= {f"ema/{name}": tensor for name, tensor in job.ema.module.state_dict().items()}
    tensors |= optimizer_tensors(job.model, optimizer)
    tensors |= statistics_of_all(job.accelerator, statistics_here(job.model, job.ema))
    facts = {
        "state": state.to_dict(),
        "windows": job.accelerator.gather(tally.values[None]).tolist(),
        "schedule": schedule.state,
        "scaler": job.accelerator.scaler.state_dict() if job.accelerator.scaler is not None else None,
        "ema_steps": job.ema.steps if job.ema is not None else 0,
        "processes": job.accelerator.num_processes,
        "global_batch": job.plan.share.global_batch,
        "config": kept(job.plan.cfg),
        "directory": str(Path.cwd()),  # where the relative paths of the config start
        "data": job.plan.index.fingerprint(),
    }
    folder = job.run.path / "checkpoints"
    on_main(job.accelerator, lambda: write_state(folder, tensors, facts, job.plan.cfg.run.keep_last) and None)


def statistics_here(model: nn.Module, ema: Ema | None) -> dict[str, torch.Tensor]:
    """The running statistics of this process: of the network and of its average."""
    statistics = {f"model/{name}": buffer for name, buffer in running_statistics(model).items()}
    if ema is not None:
        statistics |= {f"ema/{name}": buffer for name, buffer in running_statistics(ema.module).items()}
    return statistics


def statistics_of_all(accelerator: Accelerator, statistics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The running statistics of every process, as `statistics/<process>/...`; `statistics` are those of this one."""
    flat = torch.cat([buffer.flatten() for buffer in statistics.values()])
    gathered = accelerator.gather(flat[None]).cpu()
    sizes = [buffer.numel() for buffer in statistics.values()]
    return {
        f"statistics/{process}/{name}": part.clone()
        for process, row in enumerate(gathered)
        for name, part in zip(statistics, row.split(sizes), strict=True)
    }


def read_resumed(accelerator: Accelerator, run: RunFolder) -> tuple[Resumed, list[str]]:
    """The newest state of a run that verifies, and warnings. The main process reads it. Raises ArtifactError."""
    read: dict[str, torch.Tensor] = {}

    def facts_and_warnings() -> tuple[dict[str, Any], list[str]]:
        remove_leftovers(run.path)
        tensors, facts, warnings = read_newest_state(run.path / "checkpoints")
        read.update(tensors)
        return facts, warnings

    facts, warnings = on_main(accelerator, facts_and_warnings)
    tensors = share_tensors(accelerator, read if accelerator.is_main_process else None)
    return Resumed(State.from_dict(facts["state"]), tensors, facts), warnings


def restore_model(resumed: Resumed, job: Job) -> None:
    """Restore the weights and their moving average. Raises ArtifactError if they are of another network."""
    with fitting(job.run.path):
        job.model.load_state_dict(_under("model/", resumed.tensors))
        if job.ema is not None:
            job.ema.module.load_state_dict(_under("ema/", resumed.tensors))
            job.ema.steps = int(resumed.facts["ema_steps"])


def restore_learner(
    resumed: Resumed, job: Job, optimizer: torch.optim.Optimizer, schedule: Schedule, tally: Tally
) -> None:
    """Restore the state of the optimizer, the schedule and the GradScaler in the phase that was interrupted.

    Each process also gets its own running statistics again, because wrapping made them equal. With another number of
    processes, all keep those of the first. Raises ArtifactError if the state does not belong to this run.
    """
    with fitting(job.run.path):
        windows, process = torch.tensor(resumed.facts["windows"]), job.accelerator.process_index
        if resumed.facts["processes"] == job.accelerator.num_processes:
            tally.values.copy_(windows[process])
            own = _under(f"statistics/{job.accelerator.process_index}/", resumed.tensors)
            for name, buffer in statistics_here(job.model, job.ema).items():
                buffer.copy_(own[name])
        elif process == 0:
            tally.values.copy_(windows.sum(dim=0))
        restore_optimizer(job.model, optimizer, resumed.tensors)
        schedule.state = dict(resumed.facts["schedule"])
        saved = resumed.facts.get("scaler")  # states of older versions have none
        if job.accelerator.scaler is not None and saved is not None:
            known = job.accelerator.scaler.state_dict()
            job.accelerator.scaler.load_state_dict({name: type(known[name])(saved[name]) for name in known})


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def changes(
    run: Path, resumed: Resumed, cfg: TrainConfig, fingerprint: Mapping[str, Any], global_batch: int
) -> list[str]:
    """What differs from the run that is resumed, as lines `old -> new`.

    Raises UsageError if a difference would make it another run: other data, classes, network or preprocessing.
    """
    facts = resumed.facts
    with fitting(run):
        other_data = "" if facts["data"] == fingerprint else _data_difference(facts["data"], fingerprint)
        directory = Path(str(facts.get("directory", "")))
        differences = [
            (section, name, old, new)
            for section, name, old, new in _differences(_complete(facts["config"]), _complete(kept(cfg)))
            if not (name in PATHS.get(section, ()) and Path(new).absolute() == directory / old)
        ]
        batch_then = facts["global_batch"]
    if other_data:
        raise UsageError(other_data)
    lines: list[str] = []
    refused: list[str] = []
    for section, name, old, new in differences:
        line = f"--{name.replace('_', '-')} {old} -> {new}"
        fixed = FIXED.get(section, set())
        (refused if section in FIXED and (fixed is None or name in fixed) else lines).append(line)
    if batch_then != global_batch:
        refused.append(f"global batch {batch_then} -> {global_batch}")
    if refused:
        raise UsageError(
            [f"a resumed run keeps its settings, but {line}; start a new run for that" for line in refused]
        )
    return lines


def _complete(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored config, completed by the settings that older versions did not store."""
    return {**config, "run": {"random_stream": 0, "report": True, **config["run"]}}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    for section in sorted(old.keys() | new.keys()):
        before, after = old.get(section), new.get(section)
        if isinstance(before, dict) and isinstance(after, dict):
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name):
                    yield section, name, before.get(name, "automatic"), after.get(name, "automatic")
        elif before != after:
            yield section, section, before, after


def _data_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    gone = sorted(set(old["classes"]) - set(new["classes"]))
    added = sorted(set(new["classes"]) - set(old["classes"]))
    if gone or added:
        words = [f"without {', '.join(gone)}" if gone else "", f"with new {', '.join(added)}" if added else ""]
        return f"the classes are no longer those of this run: {' and '.join(filter(None, words))}; start a new run"
    counts = f"{old['images']} images then, {new['images']} now"
    return f"the images or their split are no longer those of this run ({counts}); restore them or start a new run"
