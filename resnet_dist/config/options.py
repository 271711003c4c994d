"""From text to the config classes: recipe, TOML file and command line. All problems are collected, then raised.

Options are flat (`--lr`, not `--optim.lr`): the name of a field is the name of its option, with hyphens or underscores,
and its key in the section of the TOML file that bears its dataclass's name.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn

from resnet_dist.config.duration import Duration
from resnet_dist.config.schema import Phase, TrainConfig
from resnet_dist.config.stored import Layer, read_toml, stored_config
from resnet_dist.errors import UsageError
from resnet_dist.files.header import network_of
from resnet_dist.runtime.wording import suggestion


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """The strings that stand under the fields of a dataclass: its attribute docstrings."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    texts = {}
    for node, below in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[typing.cast(ast.Name, node.target).id] = inspect.cleandoc(str(below.value.value))
    return texts


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting that can be typed: where it belongs, what it takes, how it is called."""

    section: str  # "" for a field of the verb's own dataclass, "phase" for a field of Phase
    name: str
    kind: Any
    default: Any
    help: str
    aliases: tuple[str, ...]
    positional: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and kind is not Duration


@functools.cache
def options_of(cls: type) -> tuple[Option, ...]:
    """All options of a verb's config class, its sections flattened; Phase's fields too where it has phases."""
    found = list(_own_options(cls, ""))
    for field in dataclasses.fields(cls):
        if field.name == "phase":
            found += [option for option in _own_options(Phase, "phase") if option.name != "epochs"]
    return tuple(found)


def _own_options(cls: type, section: str, made: Any = None) -> Iterator[Option]:
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if _is_section(kinds[field.name]):
            yield from _own_options(kinds[field.name], field.name, field.default)
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
    """A value from the command line (text) or from TOML as the type of its field.

    Raises ValueError with what was expected.
    """
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return convert(next(a for a in arguments if a is not type(None)), value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"must be one of {', '.join(arguments)}{suggestion(str(value), arguments)}")
        return value
    if origin is tuple:
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        return tuple(convert(arguments[0], item) for item in (items if isinstance(items, list) else [items]))
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
        return Duration.parse(value)
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
# Layers: recipe < file < command line, as nested dicts {section: {field: value}}


def merge(below: Layer, above: Layer) -> Layer:
    """Two layers, the second winning field by field; a list of phases replaces the list below it."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        wrong = isinstance(value, dict) and name in merged and not both
        merged[name] = {**merged[name], **value} if both else merged[name] if wrong else value
    return merged


def build(cls: type, layer: Layer) -> tuple[Any, list[str]]:
    """The config that a layer describes and every problem of type or name; what is wrong keeps its default."""
    problems: list[str] = []
    return _build(cls, layer, "", problems), problems


def _build(cls: type, layer: Layer, section: str, problems: list[str], default: Any = None) -> Any:
    kinds = typing.get_type_hints(cls)
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
    kinds = typing.get_type_hints(cls)
    where = f"[{section}] has no '{name}'" if section else f"there is no section or key '{name}'"
    return where + suggestion(name, list(kinds))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing a usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser(cls: type, program: str, recipes: Callable[[], Sequence[str]] | None) -> Parser:
    """The parser of a verb. Every value arrives as text: `convert` is the one judge of types."""
    parser = Parser(
        prog=program,
        description=inspect.getdoc(cls),
        allow_abbrev=False,
        usage=f"{program} [OPTIONS]"
        + "".join(
            f" [{o.name.upper()}{' ...' if typing.get_origin(o.kind) is tuple else ''}]"
            for o in options_of(cls)
            if o.positional
        ),
        epilog="--debug, anywhere, shows the traceback of an error.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32, width=110),
    )
    if recipes is not None:
        layers = parser.add_argument_group("settings (recipe < file < command line)")
        layers.add_argument("--recipe", metavar="NAME", help="A named technique: " + ", ".join(recipes()) + ".")
        layers.add_argument("-c", "--config", metavar="FILE", help="A TOML file, such as the config.toml of a run.")
        layers.add_argument(
            "--phase",
            action="append",
            metavar="N.FIELD=VALUE",
            help="Set one field of one phase, such as 2.backbone_lr_scale=0.1 or 1.epochs=3.",
        )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options_of(cls):
        group = groups.get(option.section) or parser.add_argument_group(option.section or "options")
        groups[option.section] = group
        _add(group, option)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """An option under its own name, and under its aliases, which the help names in brackets."""
    shown = _shown_default(option.default)
    text = option.help + ("" if shown is None or "(default" in option.help else f" (default: {shown})")
    short = [alias for alias in option.aliases if not alias.startswith("--")]
    long = [alias for alias in option.aliases if alias.startswith("--")]
    text += f" [also {', '.join(long)}]" if long else ""
    how: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    how |= {"action": argparse.BooleanOptionalAction} if option.kind is bool else {"metavar": _metavar(option.kind)}
    if option.positional:
        group.add_argument(
            option.name,
            nargs="*" if typing.get_origin(option.kind) is tuple else "?",
            metavar=option.name.upper(),
            help=text.replace("%", "%%"),
            default=argparse.SUPPRESS,
        )
    else:
        group.add_argument(*short, option.flag, help=text.replace("%", "%%"), **how)
    if long:
        group.add_argument(*long, help=argparse.SUPPRESS, **how)


def _shown_default(default: Any) -> str | None:
    if default is None or default is dataclasses.MISSING or isinstance(default, bool):
        return None
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(arguments) + "}"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return _metavar(next(a for a in arguments if a is not type(None)))
    if typing.get_origin(kind) is tuple:
        return _metavar(arguments[0]) + ",..."
    names = {int: "N", float: "X", str: "TEXT", Duration: "DURATION"}
    return names.get(kind, "NAME=X,...")


def parse(
    cls: type, argv: Sequence[str], program: str, recipes: Callable[[], Mapping[str, Layer]] | None = None
) -> Any:
    """The config of a verb from its command line (and the recipe and file that it names).

    Raises UsageError that carries every problem at once. `--help` prints and raises SystemExit(0).
    """
    parser = make_parser(cls, program, (lambda: list(recipes())) if recipes else None)
    known, unknown = parser.parse_known_args([_hyphens(argument) for argument in argv])
    typed = vars(known)
    problems = [_unknown_argument(parser, text) for text in unknown]
    layer: Layer = {}
    if recipes is not None:
        layer, wrong = _layers_below(cls, typed, recipes())
        problems += wrong
    phase_settings = typed.pop("phase", None) or []
    if "batch_size" in typed and isinstance(layer.get("data"), dict):
        layer["data"] = {**layer["data"]}
        layer["data"].pop("global_batch_size", None)  # from a file; what is typed wins
    layer = merge(layer, _typed_layer(cls, typed))
    problems += _set_phases(cls, layer, typed, phase_settings)
    config, wrong = build(cls, layer)
    problems += wrong
    problems += [
        problem for problem in config.problems() if problem.split(":")[0] not in {p.split(":")[0] for p in wrong}
    ]
    if problems:
        raise UsageError(problems)
    return config


def _hyphens(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _unknown_argument(parser: argparse.ArgumentParser, text: str) -> str:
    if not text.startswith("-"):
        return f"unexpected argument '{text}'"
    flags = [flag for action in parser._actions for flag in action.option_strings]
    name = text.partition("=")[0]
    return f"unknown option '{name}'{suggestion(name, flags)}"


def _layers_below(cls: type, typed: dict[str, Any], recipes: Mapping[str, Layer]) -> tuple[Layer, list[str]]:
    """The recipe with the file upon it (or the config of the run that is resumed), and what is wrong with them.

    Sections that only `train` has are left out for other verbs.
    """
    recipe, file, problems = typed.pop("recipe"), typed.pop("config"), []
    stored = stored_config(typed)
    layer = merge(stored, read_toml(file) if file else {})
    old = None if stored else typed.get("init_from") or _value(layer, "run", "init_from")
    if old is not None and "weights" in typed:
        problems.append(f"--weights {typed['weights']} and --init-from {old} both say where to start: give one of them")
    if stored and recipe is not None and recipe != stored.get("recipe"):
        problems.append(f"--recipe {recipe}: a resumed run keeps its recipe ({stored.get('recipe', 'none')})")
    name = layer.get("recipe") if stored else recipe or layer.get("recipe")
    if isinstance(name, str) and name in recipes:
        layer = {**merge(recipes[name], layer), "recipe": name}
    elif name is not None:
        near = suggestion(str(name), list(recipes)) or "; `resnet-dist recipes` lists them"
        problems.append(f"--recipe: there is no recipe '{name}'{near}")
    if isinstance(old, str):  # what the old run knows of itself need not be said again
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
    """Apply `--phase N.field=value`, and `--trainable` and its like where there is one phase only."""
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
            problems.append(
                f"{option.flag} is unclear with {len(phases)} phases: say --phase N.{option.name}={typed[option.name]}"
            )
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
