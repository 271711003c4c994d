"""Read the command line of a verb into its config class, and report every mistake in one line."""

import dataclasses
import functools
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from resnet_dist.cli.help import help_text
from resnet_dist.cli.spellings import hint_for_option, hint_for_pair, hint_for_value
from resnet_dist.config.layers import Option, has_recipes, options_of, resolve
from resnet_dist.errors import OPTION, ResnetDistError
from resnet_dist.runtime import environment

SPECIAL = {"--recipe": "recipe", "-c": "config", "--config": "config", "--phase": "phase"}
HELP = {"-h": "common", "--help": "common", "--help-all": "all"}
NUMBER = re.compile(r"-\.?\d")


@dataclasses.dataclass(frozen=True)
class Flag:
    """One spelling of an option: `--optimizer`, `-b`, `--no-ema`."""

    name: str  # of the option
    canonical: str  # the spelling that the code uses in its errors
    switch: bool | None = None  # what a switch such as --no-ema sets; None for an option with a value
    bare: str | None = None  # the value if the option is typed without one


@functools.cache
def flags_of(cls: type) -> dict[str, Flag]:
    """Every spelling of every option of a config class."""
    flags: dict[str, Flag] = {}
    if has_recipes(cls):
        flags |= {spelling: Flag(name, f"--{name}") for spelling, name in SPECIAL.items()}
    for option in options_of(cls):
        for spelling in (*(() if option.positional else (option.flag,)), *option.aliases):
            flags[spelling] = Flag(option.name, option.flag, True if option.kind is bool else None, _bare(option))
            if option.kind is bool and spelling.startswith("--"):
                flags[_negated(spelling)] = Flag(option.name, _negated(option.flag), False)
    return flags


def _negated(flag: str) -> str:
    return flag.replace("--", "--no-", 1)


def _bare(option: Option) -> str | None:
    """The value of an option that is typed without one; None if it needs a value."""
    if option.name == "resume":
        return "auto"
    return "on" if typing.get_origin(option.kind) is Literal and "on" in typing.get_args(option.kind) else None


@dataclasses.dataclass
class Words:
    """The options and mistakes of a command line."""

    given: dict[str, Any] = dataclasses.field(default_factory=dict)  # by the name of the option, as text
    spelled: dict[str, str] = dataclasses.field(default_factory=dict)  # by the canonical spelling: as it was typed
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    help: str = ""  # "common" or "all" if help was asked for


def read(cls: type, argv: Sequence[str]) -> Words:
    """Read what was typed after the verb."""
    words, rest = Words(), list(argv)
    free: list[str] = []  # values without an option
    doubtful: list[str] = []  # values after an unknown option, which may belong to it
    while rest:
        word = rest.pop(0)
        if word == "--":
            free += rest
            break
        if not _is_option(word):
            free.append(word)
        elif word in HELP:
            words.help = HELP[word]
        elif not _read_option(cls, words, word, rest) and rest and not _is_option(rest[0]):
            doubtful.append(rest.pop(0))
    _fill_positions(cls, words, free, doubtful)
    return words


def _is_option(word: str) -> bool:
    is_value = NUMBER.match(word) or re.search(r"\s", word.partition("=")[0])
    return len(word) > 1 and word.startswith("-") and not is_value


def _read_option(cls: type, words: Words, word: str, rest: list[str]) -> bool:
    """Read an option, and its value from `rest`, into `words`. Returns whether the option exists."""
    flags = flags_of(cls)
    spelling, equals, value = word.partition("=")
    if spelling.startswith("--"):
        spelling = spelling.replace("_", "-")
    elif word[:2] in flags and len(spelling) > 2:  # -b7
        spelling, equals, value = word[:2], "=", word[2:]
    if spelling not in flags:
        near = [flag for flag in flags if not flag.startswith("--no-")]
        words.problems.append(f"unknown option '{spelling}'{hint_for_option(spelling, near)}")
        return False
    flag = flags[spelling]
    if flag.switch is not None:
        _set_switch(words, spelling, flag, value if equals else _logical(rest))
    elif equals:
        _set(cls, words, spelling, flag, value)
    elif rest and not _is_option(rest[0]):
        _set(cls, words, spelling, flag, rest.pop(0))
    elif flag.bare is not None:
        _set(cls, words, spelling, flag, flag.bare)
    else:
        words.problems.append(f"{spelling} needs a value{_dashed(rest, spelling, flags)}")
    return True


def _logical(rest: list[str]) -> str | None:
    """A `true` or `false` that was typed after a switch."""
    return rest.pop(0) if rest and rest[0].lower() in ("true", "false") else None


def _dashed(rest: list[str], spelling: str, flags: dict[str, Flag]) -> str:
    """How to type a value that begins with '-'. Such a value is removed from `rest`."""
    if not rest or rest[0] == "--" or rest[0].partition("=")[0].replace("_", "-") in {*flags, *HELP}:
        return ""
    return f"; one that begins with '-' is typed as {spelling}={rest.pop(0)}"


def _set_switch(words: Words, spelling: str, flag: Flag, value: str | None) -> None:
    if value is not None:
        opposite = spelling.replace("--no-", "--", 1) if flag.switch is False else _negated(spelling)
        words.problems.append(f"{spelling} {value}: it takes no value; type {spelling}, or {opposite} for the opposite")
    else:
        words.given[flag.name] = flag.switch
        words.spelled[flag.canonical] = spelling


def _set(cls: type, words: Words, spelling: str, flag: Flag, value: str) -> None:
    if flag.name == "phase":
        words.given.setdefault("phase", []).append(value)
        return
    kinds = {option.name: option.kind for option in options_of(cls)}
    hint = hint_for_value(flag.name, value) if value not in typing.get_args(kinds.get(flag.name, str)) else ""
    if hint:
        words.problems.append(f"{spelling} {value}: {hint}")
        return
    words.given[flag.name] = value
    words.spelled[flag.canonical] = spelling


def _fill_positions(cls: type, words: Words, free: list[str], doubtful: list[str]) -> None:
    """Assign values without an option to the positional options; values after an unknown option come last."""
    pairs = [word for word in free if hint_for_pair(word, flags_of(cls))]
    words.problems += [f"unexpected argument '{pair}'{hint_for_pair(pair, flags_of(cls))}" for pair in pairs]
    free = [word for word in free if word not in pairs]
    for option in options_of(cls):
        if not option.positional:
            continue
        several = typing.get_origin(option.kind) is tuple
        values = [*free, *doubtful] if several else (free or doubtful)[:1]
        doubtful = [] if several else doubtful if free else doubtful[1:]
        free = [] if several else free[1:]
        if values and option.name in words.given:  # by an alias such as --data
            words.notes.append(f"{option.name.upper()} is given more than once; {words.given[option.name]} is used")
        elif values:
            words.given[option.name] = values if several else values[0]
    words.problems += [f"unexpected argument '{word}'" for word in free]


def parse(cls: type, argv: Sequence[str], program: str) -> Any:
    """The config of a verb, from its command line and the recipe and file that this names.

    Raises UsageError that carries every problem. `--help` and `--help-all` print and raise SystemExit(0).
    """
    words = typed(cls, argv, program)
    return resolve(cls, words.given, words.problems)


def typed(cls: type, argv: Sequence[str], program: str) -> Words:
    """Read what was typed, and print notes on it. `--help` and `--help-all` print and raise SystemExit(0)."""
    words = read(cls, argv)
    if words.help:
        print(help_text(cls, program, words.given, everything=words.help == "all"))
        raise SystemExit(0)
    if environment.rank() == 0:
        for note in words.notes:
            print(f"{program}: note: {note}", file=sys.stderr)
    return words


@contextmanager
def named_as_typed(cls: type, argv: Sequence[str]) -> Iterator[None]:
    """Errors raised inside name each option as it was typed: `--lr-scheduler`, if that is how `--sched` was typed."""
    try:
        yield
    except ResnetDistError as error:
        spelled = {flag: spelling for flag, spelling in read(cls, argv).spelled.items() if flag != spelling}
        error.reword(lambda text: as_typed(text, spelled))
        raise


def as_typed(text: str, spelled: dict[str, str]) -> str:
    """A text with other spellings in place of the canonical ones."""
    return OPTION.sub(lambda match: spelled.get(match[0], match[0]), text)
