"""Settings on disk: a config as TOML, and the stored form of a run's config."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from resnet_dist.config import TrainConfig
from resnet_dist.duration import Duration
from resnet_dist.errors import UsageError
from resnet_dist.reading import read_bounded

MAX_TOML_BYTES = 1 << 20
Layer = dict[str, Any]


def read_toml(path: str | Path) -> Layer:
    """A TOML file as nested dicts. Raises UsageError in one line for a missing, huge or malformed file."""
    try:
        return tomllib.loads(read_bounded(Path(path), MAX_TOML_BYTES).decode(errors="surrogateescape"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a TOML file ({error})") from None


def to_toml(config: TrainConfig) -> str:
    """The stored form of a config as TOML that `-c` reads back."""
    return tomli_w.dumps(kept(config))


def kept(config: TrainConfig) -> Layer:
    """The config as it is stored: without where it went, which is no part of what was trained."""
    values: Layer = plain(config)
    passing = ("output_dir", "overwrite", "resume", "dry_run")
    run = {name: value for name, value in values["run"].items() if name not in passing}
    *earlier, last = values["phase"]  # the last takes the rest of the epochs, whatever --epochs becomes
    return {**values, "run": run, "phase": [*earlier, {k: v for k, v in last.items() if k != "epochs"}]}


def portable(config: TrainConfig) -> Layer:
    """The stored form without paths: what a checkpoint may carry to other machines and people."""
    values = kept(config)
    paths = ("data", "val_dir", "exclude_list", "init_from", "cache_dir")
    for section in ("data", "run"):
        values[section] = {name: value for name, value in values[section].items() if name not in paths}
    values["model"] = {**values["model"], "weights": Path(config.model.weights).name}
    values["loss"] = {**values["loss"], "class_weights": Path(config.loss.class_weights).name}
    return values


def plain(value: Any) -> Any:
    """Dataclasses, tuples and durations as what TOML and JSON know; None (automatic) is left out."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: plain(item) for name, item in fields.items() if item is not None}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def stored_config(typed: Mapping[str, Any]) -> Layer:
    """The config of the run that `--resume` names; nothing where `auto` finds no run yet."""
    folder = typed.get("output_dir") if typed.get("resume") == "auto" else typed.get("resume")
    if folder is None:
        return {}
    file = Path(folder) / "config.toml"
    if typed.get("resume") == "auto" and not file.exists():
        return {}
    return read_toml(file)
