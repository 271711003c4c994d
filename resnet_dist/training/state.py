"""The progress of a run, and its checkpoints on disk: complete, verified, without pickle."""

import dataclasses
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from resnet_dist.errors import ArtifactError, MachineError
from resnet_dist.evaluation.records import Records
from resnet_dist.files.reading import parse_json, read_bounded
from resnet_dist.files.run import MANIFEST, STATE_NAME, is_written, sync_folder, to_json

MAX_FACTS, MAX_STATE = 1 << 24, 1 << 34  # bytes
TENSORS, FACTS = "state.safetensors", "state.json"
UNSAVED = ("started", "best_records")  # fields of State that are only for this process
UNFINISHED = re.compile(r"\.tmp-\d+")  # an unfinished state, with the number of the process that writes it
REPLACED = ".replaced"  # suffix of a state while another of the same step replaces it


@dataclass(frozen=True)
class Best:
    """The best epoch so far: its headline metrics, its number (from 1), and whether raw or averaged weights made it."""

    score: Mapping[str, float]
    epoch: int
    weights_kind: str


@dataclass
class State:
    """The progress of a run: with the weights and the optimizer, enough to continue.

    `sums` are the training sums of the epoch so far (loss, weight, correct, samples, over all processes). `seconds` is
    the time of the run before this process started. `skipped` counts the steps of the phase that fp16 skipped.
    `best_records` are the validation records of the best epoch if the final evaluation would compute the same ones;
    they are not saved.
    """

    phase: int = 0
    epoch_in_phase: int = 0
    step_in_epoch: int = 0
    epochs_done: int = 0
    steps_done: int = 0
    skipped: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    epoch_seconds: float = 0.0
    best: Best | None = None
    best_records: Records | None = None
    epochs_since_best: int = 0
    stopped_by: str | None = None
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds of training so far, including those before an interruption."""
        return self.seconds + time.monotonic() - self.started

    def begin_phase(self, number: int) -> None:
        """Move to the start of a phase. Early stopping ends only a phase, so its count starts again."""
        self.phase, self.epoch_in_phase, self.epochs_since_best, self.stopped_by = number, 0, 0, None
        self.skipped = 0

    def end_epoch(self) -> dict[str, float]:
        """Move to the next epoch. Returns the mean loss, top1 and speed of the one that ended, over all processes."""
        loss, weight, correct, count = self.sums
        seconds = self.epoch_seconds
        self.sums, self.epoch_seconds = [0.0] * 4, 0.0
        self.epochs_done += 1
        self.epoch_in_phase += 1
        self.step_in_epoch = 0
        return {
            "loss": loss / weight,
            "top1": correct / count,
            "images_per_second": count / seconds,
            "seconds": seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in UNSAVED}
        best = dataclasses.asdict(self.best) if self.best else None
        return {**values, "best": best, "seconds": self.elapsed()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "State":
        """From the stored form. Raises KeyError, TypeError or ValueError if it is malformed."""
        best = values["best"]
        state = cls(**{**values, "best": Best(**best) if best else None})
        counters = (state.phase, state.epoch_in_phase, state.step_in_epoch, state.epochs_done, state.steps_done)
        if not all(type(n) is int and n >= 0 for n in (*counters, state.epochs_since_best, state.skipped)):
            raise ValueError("a counter is not a whole number")
        if not all(isinstance(n, int | float) for n in (*state.sums, state.epoch_seconds, state.seconds)):
            raise ValueError("a sum is not a number")
        return state


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `optimizer/<key>/<parameter name>`."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"optimizer/{key}/{name}"] = value
    return found


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the tensors that `optimizer_tensors` returned."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            entry, _, name = rest.partition("/")
            parameter = parameters[name]
            if value.shape == parameter.shape:
                # In the parameter's memory layout, which fused optimizers assume.
                restored = torch.empty_like(parameter).copy_(value)
            else:  # a counter of steps: fused optimizers keep it on the device, the others on the CPU
                restored = value.to(parameter.device if optimizer.defaults.get("fused") else "cpu", copy=True)
            optimizer.state[parameter][entry] = restored


def write_state(folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """Write one state into `folder` (the run's checkpoints), then remove all but the newest `keep`.

    It gets its name only when everything is on disk. Raises MachineError; older states are then unchanged.
    """
    final = folder / f"step-{facts['state']['steps_done']:09d}"
    temporary = folder / f".tmp-{os.getpid()}"
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    contents = {TENSORS: save(plain), FACTS: to_json(facts).encode()}
    contents[MANIFEST] = to_json({name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}).encode()
    failed = f"{final}: the checkpoint cannot be written ({{}}); older ones are intact"
    try:
        temporary.mkdir()
    except OSError as error:
        raise MachineError(failed.format(error.strerror)) from None
    try:
        for name, data in contents.items():
            with (temporary / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        sync_folder(temporary)
        if final.exists():  # of the same step: renamed, and removed only when the new one is in place
            final.rename(_aside(final))
        temporary.rename(final)
        sync_folder(folder)
    except OSError as error:
        _remove(temporary)
        raise MachineError(failed.format(error.strerror)) from None
    kept = [path for path in _states(folder) if path == final or path.stem != final.name][:keep]
    for path in _state_folders(folder):
        if path not in kept:
            _remove(path)
    return final


def _aside(final: Path) -> Path:
    """A free name for a state while another of the same step replaces it."""
    names = (final.with_name(f"{final.name}{REPLACED}{number or ''}") for number in itertools.count())
    return next(path for path in names if not os.path.lexists(path))


def _remove(state: Path) -> None:
    """Remove the files of a state, as far as permitted. Other files in its folder stay, and so does the folder."""
    with suppress(OSError):
        for name in (MANIFEST, TENSORS, FACTS):
            (state / name).unlink(missing_ok=True)
        state.rmdir()


def _state_folders(folder: Path) -> list[Path]:
    """The folders in a folder that have the name of a state, the newest first."""
    found = (path for path in folder.glob("step-*") if STATE_NAME.fullmatch(path.name))
    found = (path for path in found if path.is_dir() and not path.is_symlink())
    return sorted(found, key=lambda path: (path.stem, not path.suffix, path.suffix), reverse=True)


def _states(folder: Path) -> list[Path]:
    """The states in a folder, the newest first. A folder without a manifest is not a state."""
    return [path for path in _state_folders(folder) if (path / MANIFEST).exists()]


def newest_state(folder: Path) -> Path | None:
    """The newest state in a folder, by name; it must have a manifest."""
    return next(iter(_states(folder)), None)


def read_newest_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """The newest state that verifies: tensors, facts, and a warning for each newer one that does not.

    Raises ArtifactError if there is none.
    """
    warnings = []
    for path in _state_folders(folder):
        if not any((path / name).exists() for name in (MANIFEST, TENSORS, FACTS)):
            continue
        try:
            tensors, facts = _read_state(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
            warnings.append(f"WARNING: {path}: passed over, it does not verify ({error})")
        else:
            return tensors, facts, warnings
    raise ArtifactError(f"{folder}: no checkpoint to resume from" + "".join(f"; {w}" for w in warnings))


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    manifest = parse_json(read_bounded(path / MANIFEST, MAX_FACTS))
    contents = {name: read_bounded(path / name, MAX_FACTS if name == FACTS else MAX_STATE) for name in (TENSORS, FACTS)}
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != manifest[name]:
            raise ValueError(f"{name} is not what its manifest says")
    facts = parse_json(contents[FACTS])
    State.from_dict(facts["state"])
    return load(contents[TENSORS]), facts


@contextmanager
def fitting(run: Path) -> Iterator[None]:
    """In this context, a saved state that does not belong to this run raises ArtifactError instead of an error of
    torch.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"{run}: its checkpoint does not fit this run ({reason[:200]}); start a new one") from None


def remove_leftovers(run: Path) -> None:
    """Remove the temporary files of a killed process from a run. Raises MachineError if that is not allowed.

    Files that the program does not write stay, and so do their folders.
    """
    checkpoints = run / "checkpoints"
    try:
        for path in (*run.glob(".tmp-*"), *checkpoints.glob(".tmp-*")):
            if path.is_file() and not path.is_symlink() and is_written(path.relative_to(run).parts):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"{run}: leftovers of a killed run cannot be removed ({error.strerror})") from None
    remove_unfinished(checkpoints)


def remove_unfinished(folder: Path) -> None:
    """Remove the states in a folder that a killed process had not finished."""
    for path in folder.glob(".tmp-*"):
        if UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _remove(path)
