"""A config from its layers: recipe < TOML file < command line or Python keywords. All problems are raised together.

Options are flat (`--lr` or `lr=`, not `optim.lr`): an option has the name of its field, and so has its key in the TOML
file, in the section named after the field's dataclass.
"""

import ast
import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from resnet_dist.config import recipes as shipped
from resnet_dist.config.duration import Duration
from resnet_dist.config.schema import Phase, TrainConfig
from resnet_dist.config.stored import Layer, read_toml, stored_config
from resnet_dist.errors import UsageError
from resnet_dist.files.header import network_of
from resnet_dist.runtime.wording import suggestion


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """The attribute docstrings of a dataclass and of its bases: the string below each field."""
    texts: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(one):
            texts.update(_help_in_body(one))
    return texts


def _help_in_body(cls: type) -> Iterator[tuple[str, str]]:
    """The name and the docstring of each field that the body of a class states."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    for node, below in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield typing.cast(ast.Name, node.target).id, inspect.cleandoc(str(below.value.value))


@functools.cache
def kinds_of(cls: type) -> Mapping[str, Any]:
    """The type of every field of a dataclass."""
    return typing.get_type_hints(cls)


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting: its place in the config, its type, default, help text and spellings."""

    section: str  # "" for a field of the config class itself, "phase" for a field of Phase
    name: str
    kind: Any
    default: Any
    help: str
    aliases: tuple[str, ...]
    positional: bool

    @property
    def flag(self) -> str:
        """The option on the command line, such as `--batch-size`."""
        return "--" + self.name.replace("_", "-")


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and kind is not Duration


@functools.cache
def options_of(cls: type) -> tuple[Option, ...]:
    """All options of a config class, its sections flattened; the fields of Phase too, if it has phases."""
    own: Mapping[str, str] = getattr(cls, "HELP", {})  # texts of a verb that uses an option of train differently
    options = [dataclasses.replace(option, help=own.get(option.name, option.help)) for option in _options_in(cls, "")]
    if has_recipes(cls):
        options += [option for option in _options_in(Phase, "phase") if option.name != "epochs"]
    return tuple(options)


def has_recipes(cls: type) -> bool:
    """Whether a config class has phases: then it takes a recipe, a TOML file and `phase` settings."""
    return any(field.name == "phase" for field in dataclasses.fields(cls))


def _options_in(cls: type, section: str, made: Any = None) -> Iterator[Option]:
    kinds = kinds_of(cls)
    for field in dataclasses.fields(cls):
        if _is_section(kinds[field.name]):
            yield from _options_in(kinds[field.name], field.name, field.default)
        elif field.name not in ("phase", "recipe"):
            yield Option(
                section,
                field.name,
                kinds[field.name],
                field.default if made is None else getattr(made, field.name),
                field_help(cls).get(field.name, ""),
                field.metadata.get("aliases", ()),
                field.metadata.get("positional", False),
            )


# ---------------------------------------------------------------------------------------------------------------------
# Values


def convert(kind: Any, value: Any) -> Any:
    """A value from the command line (text), a TOML file or Python as the type of its field.

    Raises ValueError that says what was expected.
    """
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        words = [word for a in arguments if typing.get_origin(a) is Literal for word in typing.get_args(a)]
        if value in words:
            return value
        return convert(next(a for a in arguments if a is not type(None)), value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"must be one of {', '.join(arguments)}{suggestion(str(value), arguments)}")
        return value
    if origin is tuple:
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        return tuple(convert(arguments[0], item) for item in (items if isinstance(items, list | tuple) else [items]))
    if origin is dict:
        return {str(name): convert(arguments[1], item) for name, item in _pairs(value).items()}
    return _convert_scalar(kind, value)


def _pairs(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    pairs = [item.partition("=") for item in str(value).replace(",", " ").split()]
    if not pairs or not all(equals for _, equals, _ in pairs):
        raise ValueError('must be pairs such as "layer4=1e-4 head=1e-3"')
    return {name: item for name, _, item in pairs}


def _convert_scalar(kind: Any, value: Any) -> Any:
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Duration: "a duration"}
    if isinstance(value, bool) is not (kind is bool):
        raise ValueError(
            f"must be {wanted[kind]}, not {str(value).lower() if isinstance(value, bool) else repr(value)}"
        )
    if kind is Duration:
        return value if isinstance(value, Duration) else Duration.parse(value)
    try:
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        if kind is str and not isinstance(value, str):
            raise ValueError
        converted = kind(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"must be {wanted[kind]}, not {value!r}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError(f"must be a number, not {converted}")
    return converted


# ---------------------------------------------------------------------------------------------------------------------
# Layers as nested dicts {section: {field: value}}


def merge(below: Layer, above: Layer) -> Layer:
    """Two layers in one; the second wins field by field, and its list of phases replaces the first one's."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        wrong = isinstance(value, dict) and name in merged and not both
        merged[name] = {**merged[name], **value} if both else merged[name] if wrong else value
    return merged


def build(cls: type, layer: Layer) -> tuple[Any, list[str]]:
    """The config that a layer describes, and every wrong name or type; a wrong value is left at its default."""
    problems: list[str] = []
    return _build(cls, layer, "", problems), problems


def _build(cls: type, layer: Layer, section: str, problems: list[str], default: Any = None) -> Any:
    kinds = kinds_of(cls)
    values = {}
    for name, value in layer.items():
        if name not in kinds:
            problems.append(_unknown_key(cls, name, section))
        elif name == "phase":
            values[name] = _build_phases(value, problems)
        elif _is_section(kinds[name]):
            if isinstance(value, dict):
                values[name] = _build(kinds[name], value, name, problems, getattr(cls, name))
            else:
                problems.append(f"[{name}] must be a table")
        else:
            try:
                values[name] = convert(kinds[name], value)
            except ValueError as error:
                problems.append(f"--{name.replace('_', '-')} {value}: {error}".replace(" : ", ": "))
    return cls(**values) if default is None else dataclasses.replace(default, **values)


def _build_phases(value: Any, problems: list[str]) -> tuple[Phase, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        problems.append("[[phase]] must be an array of tables")
        return (Phase(),)
    return tuple(_build(Phase, item, "phase", problems) for item in value)


def _unknown_key(cls: type, name: str, section: str) -> str:
    kinds = kinds_of(cls)
    where = f"[{section}] has no '{name}'" if section else f"there is no section or key '{name}'"
    return where + suggestion(name, list(kinds))


# ---------------------------------------------------------------------------------------------------------------------
# From flat settings to a config


def from_keywords(kind: type, settings: Mapping[str, Any]) -> Any:
    """The config of flat Python keywords: the options of the command line, with underscores; values typed or as text.

    `recipe` names a recipe and `config` a TOML file: the file wins over the recipe, and a keyword over both. `phase`
    takes a list of dicts (the phases) or of texts such as "2.lr_scale=0.1" (one field of one phase). A None where the
    field may be None means "not given". Raises UsageError that carries every problem and names each setting by its
    keyword.
    """
    options = {option.name: option for option in options_of(kind)}
    special = {"recipe", "config", "phase"} if has_recipes(kind) else set()
    given, problems = {}, []
    for name, value in settings.items():
        if value is None and (name not in options or options[name].default is None):
            continue
        if name in options or name in special:
            given[name] = _plain(value)
        else:
            problems.append(_unknown_keyword(name, [*options, *special], options.values()))
    try:
        return resolve(kind, given, problems)
    except UsageError as error:
        raise error.in_python() from None


def _plain(value: Any) -> Any:
    """A keyword's value as a TOML file could hold it: paths as text, dicts without None."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    return value


def _unknown_keyword(name: str, known: Sequence[str], options: Iterable[Option]) -> str:
    alias = "--" + name.replace("_", "-")
    for option in options:
        if alias in option.aliases:
            return f"there is no keyword '{name}'; it is called '{option.name}'"
    return f"there is no keyword '{name}'{suggestion(name, known)}"


def keyword_signature(kind: type, **own: Any) -> inspect.Signature:
    """The signature of a function whose keywords are the options of `kind`, for `help()` and notebooks.

    `own` are further keywords of the function, with their defaults.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    refused = getattr(kind, "REFUSED", ())
    options = [option for option in options_of(kind) if not option.positional and option.name not in refused]
    first = [
        inspect.Parameter(option.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=option.default)
        for option in options_of(kind)
        if option.positional
    ]
    special = [name for name in ("recipe", "config", "phase") if has_recipes(kind) and name not in refused]
    rest = [inspect.Parameter(name, keyword, default=default) for name, default in own.items()]
    rest += [inspect.Parameter(name, keyword, default=None) for name in special]
    rest += [inspect.Parameter(o.name, keyword, default=o.default, annotation=o.kind) for o in options]
    return inspect.Signature([*first, *rest])


def resolve(cls: type, given: Mapping[str, Any], problems: Sequence[str] = ()) -> Any:
    """The config of what was given by option name, on top of the recipe, TOML file or old run that it names.

    Raises UsageError that carries `problems` and every further one.
    """
    typed, problems = dict(given), list(problems)
    if isinstance(typed.get("resume"), bool) and typed.pop("resume"):  # resume=True in Python
        typed["resume"] = "auto"
    layer: Layer = {}
    if has_recipes(cls):
        layer, wrong = below(cls, typed)
        problems += wrong
    settings = _phase_settings(layer, typed.pop("phase", None) or [])
    if "batch_size" in typed and isinstance(layer.get("data"), dict):
        layer["data"] = {**layer["data"]}
        layer["data"].pop("global_batch_size", None)  # it is from a file; what is typed wins
    layer = merge(layer, _typed_layer(cls, typed))
    problems += _set_phases(cls, layer, typed, settings)
    config, wrong = build(cls, layer)
    problems += wrong
    named = {problem.split(":")[0] for problem in wrong}
    problems += [problem for problem in config.problems() if problem.split(":")[0] not in named]
    if problems:
        raise UsageError(problems)
    return config


def _phase_settings(layer: Layer, phase: Any) -> list[str]:
    """The texts `N.field=value` of a `phase` setting; phases given as dicts replace those of the layer."""
    items = phase if isinstance(phase, list) else [phase]
    tables = [item for item in items if not isinstance(item, str)]
    if tables:
        layer["phase"] = tables
    return [item for item in items if isinstance(item, str)]


def below(cls: type, typed: dict[str, Any]) -> tuple[Layer, list[str]]:
    """The recipe with the file on top (or the config of the run that is resumed), and what is wrong with them.

    Takes `recipe` and `config` out of `typed`. Leaves out sections that only `train` has, for other config classes.
    """
    recipe, file, problems = typed.pop("recipe", None), typed.pop("config", None), []
    recipes = shipped.layers()
    stored = stored_config(typed)
    layer = merge(stored, read_toml(file) if file else {})
    old = None if stored else typed.get("init_from") or _value(layer, "run", "init_from")
    if old is not None and "weights" in typed:
        problems.append(
            f"--weights {typed['weights']} and --init-from {old} both set the initial weights: give one of them"
        )
    if stored and recipe is not None and recipe != stored.get("recipe"):
        problems.append(f"--recipe {recipe}: a resumed run keeps its recipe ({stored.get('recipe', 'none')})")
    name = layer.get("recipe") if stored else recipe or layer.get("recipe")
    if isinstance(name, str) and name in recipes:
        layer = {**merge(recipes[name], layer), "recipe": name}
    elif name is not None:
        is_file = str(name).endswith(".toml")
        hint = f"; a file is given with -c {name}" if is_file else "; `resnet-dist recipes` lists them"
        near = suggestion(str(name), list(recipes)) or hint
        problems.append(f"--recipe: there is no recipe '{name}'{near}")
    if isinstance(old, str):  # the old run knows its network
        layer = merge({"model": network_of(old)}, layer)
    others = {field.name for field in dataclasses.fields(TrainConfig)} - {
        field.name for field in dataclasses.fields(cls)
    }
    return {key: value for key, value in layer.items() if key not in others}, problems


def _value(layer: Layer, section: str, name: str) -> Any:
    return layer[section].get(name) if isinstance(layer.get(section), dict) else None


def _typed_layer(cls: type, typed: Mapping[str, Any]) -> Layer:
    layer: Layer = {}
    for option in options_of(cls):
        if option.name in typed and option.section != "phase":
            place = layer.setdefault(option.section, {}) if option.section else layer
            place[option.name] = typed[option.name]
    return layer


def _set_phases(cls: type, layer: Layer, typed: Mapping[str, Any], settings: Sequence[str]) -> list[str]:
    """Apply `--phase N.field=value`, and options such as `--trainable` if there is only one phase."""
    problems = []
    names = [field.name for field in dataclasses.fields(Phase)]
    given = layer.get("phase", [{}])
    phases = [dict(phase) for phase in (given if isinstance(given, list) else []) if isinstance(phase, dict)]
    changed = False
    for option in options_of(cls):
        if option.section != "phase" or option.name not in typed:
            continue
        if len(phases) == 1:
            phases[0][option.name], changed = typed[option.name], True
        else:
            setting = f"--phase N.{option.name}={typed[option.name]}"
            problems.append(f"{option.flag} is ambiguous with {len(phases)} phases: give {setting}")
    for text in settings:
        place, _, value = text.partition("=")
        number, _, name = place.partition(".")
        name = name.replace("-", "_")
        if not number.isdecimal() or not value or not 1 <= int(number) <= len(phases) or name not in names:
            problems.append(
                f"--phase {text}: must be N.FIELD=VALUE, N from 1 to {len(phases)} and FIELD one of {', '.join(names)}"
            )
        else:
            phases[int(number) - 1][name], changed = value, True
    if changed:
        layer["phase"] = phases
    return problems
