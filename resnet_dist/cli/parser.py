"""The command line of a verb: its options from the config class, its help, and what was typed as a config."""

import argparse
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from resnet_dist.config import recipes
from resnet_dist.config.duration import Duration
from resnet_dist.config.layers import Option, has_recipes, options_of, resolve
from resnet_dist.errors import UsageError
from resnet_dist.runtime.wording import suggestion


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing a usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser(cls: type, program: str) -> Parser:
    """The parser of a verb. It leaves every value as text, which `config.layers.convert` checks."""
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
    if has_recipes(cls):
        layers = parser.add_argument_group("settings (recipe < file < command line)")
        layers.add_argument("--recipe", metavar="NAME", help="A named technique: " + ", ".join(recipes.texts()) + ".")
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


def parse(cls: type, argv: Sequence[str], program: str) -> Any:
    """The config of a verb from its command line (and the recipe and file that it names).

    Raises UsageError that carries every problem. `--help` prints and raises SystemExit(0).
    """
    parser = make_parser(cls, program)
    known, unknown = parser.parse_known_args([_hyphens(argument) for argument in argv])
    return resolve(cls, vars(known), [_unknown_argument(parser, text) for text in unknown])


def _hyphens(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _unknown_argument(parser: argparse.ArgumentParser, text: str) -> str:
    if not text.startswith("-"):
        return f"unexpected argument '{text}'"
    flags = [flag for action in parser._actions for flag in action.option_strings]
    name = text.partition("=")[0]
    return f"unknown option '{name}'{suggestion(name, flags)}"
