"""A config as TOML, and the config that a run folder stores."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_dist.config.duration import Duration
from resnet_dist.config.schema import TrainConfig
from resnet_dist.errors import UsageError
from resnet_dist.files.reading import read_bounded
from resnet_dist.files.run import read_facts
from resnet_dist.runtime.wording import similar_path

MAX_TOML_BYTES = 1 << 20
Layer = dict[str, Any]
PATHS = {  # settings that are, or may be, a path
    "data": ("data", "val_dir", "exclude_list", "cache_dir"),
    "model": ("weights",),
    "loss": ("class_weights",),
    "run": ("init_from",),
}
WORDS = {  # values of these settings that are never a path
    "weights": ("none", "DEFAULT", "IMAGENET1K_V1", "IMAGENET1K_V2"),
    "class_weights": ("none", "balanced"),
}


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
    import tomli_w  # here, because an installation that only serves a model lacks it

    return tomli_w.dumps(kept(config))


def kept(config: TrainConfig) -> Layer:
    """The config as it is stored: without the options that do not affect the result, such as the output folder."""
    values: Layer = plain(config)
    passing = ("output_dir", "overwrite", "resume", "dry_run")
    run = {name: value for name, value in values["run"].items() if name not in passing}
    *earlier, last = values["phase"]  # not of the last phase: it takes the rest of --epochs, which may change
    return {**values, "run": run, "phase": [*earlier, {k: v for k, v in last.items() if k != "epochs"}]}


def portable(config: TrainConfig) -> Layer:
    """The stored form without paths, for a checkpoint that may be given to other people."""
    values = kept(config)
    paths = ("data", "val_dir", "exclude_list", "init_from", "cache_dir")
    for section in ("data", "run"):
        values[section] = {name: value for name, value in values[section].items() if name not in paths}
    if config.run.init_from is not None:
        values["run"]["init_from"] = Path(config.run.init_from).name
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
    """The config of the run that `--resume` names; empty if `auto` finds no run."""
    folder = typed.get("output_dir") if typed.get("resume") == "auto" else typed.get("resume")
    if folder is None:
        return {}
    file = Path(folder) / "config.toml"
    if typed.get("resume") == "auto" and not file.exists():
        return {}
    if not file.exists():
        reason = "not a run folder (it has no config.toml)" if Path(folder).exists() else "there is no such run folder"
        raise UsageError(f"--resume {folder}: {reason}{similar_path(Path(folder))}")
    stored = found_again(read_toml(file), Path(folder))
    run = stored.get("run")
    if isinstance(run, dict) and "init_from" in run:  # versions without random_stream used stream 0 in every run
        run.setdefault("random_stream", 0)
    return stored


def found_again(layer: Layer, run: Path) -> Layer:
    """The config of a run, with relative paths changed so that they lead to the same files from this directory.

    They are relative to the directory in which the run was last started. If its data is not there, `data_root` is used.
    """
    facts = read_facts(run) if (run / "run.json").exists() else {}
    directory, root = Path(str(facts.get("directory", ""))), Path(str(facts.get("data_root", "")))
    found = dict(layer)
    for section, names in PATHS.items():
        values = layer.get(section)
        if not isinstance(values, dict):
            continue
        found[section] = dict(values)
        for name in names:
            value = values.get(name)
            if isinstance(value, str) and value not in WORDS.get(name, ()):
                found[section][name] = _found_path(value, directory, root if name == "data" else None)
    return found


def _found_path(value: str, directory: Path, root: Path | None) -> str:
    """A path: unchanged if it still leads to the same place, otherwise absolute."""
    there = directory / value
    if directory.is_absolute() and there.exists():
        return value if there == Path(value).absolute() else str(there)
    if root is not None and not Path(value).exists():
        named = root / Path(value).name  # a manifest lies in the folder where its paths start
        if named.is_file():
            return str(named)
        if root.is_dir() and Path(value).suffix != ".csv":
            return str(root)
    return value
