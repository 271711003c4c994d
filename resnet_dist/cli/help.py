"""The help of a verb, made from its config class, with the common options or with all."""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from resnet_dist.config import recipes
from resnet_dist.config.duration import Duration
from resnet_dist.config.layers import Option, below, build, has_recipes, options_of
from resnet_dist.errors import UsageError

WIDTH = 110
COLUMN = 32  # where the texts start
MANY = 25  # with more options, --help shows only the common ones
COMMON = {  # the title of a group of `--help`: its options
    "start from": ("recipe", "config"),
    "model and images": ("model", "img_size", "aug"),
    "training": ("epochs", "batch_size", "lr", "opt", "seed"),
    "the run": ("output_dir", "resume", "dry_run"),
    "the machine": ("workers", "mixed_precision"),
}
METAVARS = {  # the value of a text option, if TEXT says too little
    **dict.fromkeys(("output_dir", "val_dir", "cache_dir", "data"), "FOLDER"),
    **dict.fromkeys(("json", "report", "exclude_list"), "FILE"),
    **dict.fromkeys(("resume", "init_from", "runs"), "RUN"),
    **dict.fromkeys(("weights", "recipes", "tracker"), "NAME"),
    **dict.fromkeys(("group_by", "label_by"), "REGEX"),
    "push_to_hub": "REPOSITORY",
    **dict.fromkeys(("classes", "preprocessing"), "NAME|FILE"),
    "target": "CLASS",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One option as the help shows it."""

    name: str
    left: str  # how it is typed
    text: str
    aliases: str = ""


def help_text(cls: type, program: str, given: Mapping[str, Any], everything: bool) -> str:
    """The help of a verb. Defaults are those of the recipe and file in `given`.

    Raises UsageError if there is no such recipe, or the file cannot be read.
    """
    groups = dict(groups_of(cls, given))
    count = sum(map(len, groups.values()))
    short = not everything and (has_recipes(cls) or count > MANY)
    lines = [f"usage: {program} [OPTIONS]" + "".join(_positions(cls)), "", *_paragraphs(inspect.getdoc(cls) or "")]
    for title, entries in (_common(cls, groups) if short else groups).items():
        lines += ["", f"{title}:", *(line for entry in entries for line in _lines(entry))]
    lines.append("")
    if short:
        lines.append(f"{program} --help-all shows all {count} options.")
    lines.append("--debug, anywhere on the command line, shows the traceback of an error.")
    return "\n".join(lines)


def _positions(cls: type) -> Iterator[str]:
    for option in options_of(cls):
        if option.positional:
            yield f" [{option.name.upper()}{' ...' if typing.get_origin(option.kind) is tuple else ''}]"


def groups_of(cls: type, given: Mapping[str, Any]) -> Iterator[tuple[str, list[Entry]]]:
    """(title, entries) of every section, as `--help-all` shows them. Raises UsageError as `help_text` does."""
    if has_recipes(cls):
        yield "settings (recipe < file < command line)", _layer_entries()
    values = _values(cls, given)
    source = given.get("recipe") or given.get("config")
    sections: dict[str, list[Entry]] = {}
    for option in options_of(cls):
        sections.setdefault(option.section, []).append(_entry(option, values.get(option.name, option.default), source))
    for section, entries in sections.items():
        yield section or "options", entries


def _layer_entries() -> list[Entry]:
    names = ", ".join(recipes.texts())
    return [
        Entry("recipe", "--recipe NAME", f"A named technique: {names}."),
        Entry("config", "-c, --config FILE", "A TOML file, such as the config.toml of a run."),
        Entry(
            "phase",
            "--phase N.FIELD=VALUE",
            "Set one field of one phase, such as 2.backbone_lr_scale=0.1 or 1.epochs=3. Can be given several times.",
        ),
    ]


def _values(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each option with the recipe or file in `given`; values of several phases are joined by "then"."""
    layers = {name: given[name] for name in ("recipe", "config") if name in given}
    if not layers or not has_recipes(cls):
        return {}
    layer, problems = below(cls, layers)
    if problems:
        raise UsageError(problems)
    config, _ = build(cls, layer)
    values = {}
    for option in options_of(cls):
        if option.section == "phase":
            shown = [_shown(getattr(phase, option.name)) or "automatic" for phase in config.phase]
            values[option.name] = " then ".join(shown) if set(shown) != {_shown(option.default)} else option.default
        else:
            values[option.name] = getattr(getattr(config, option.section) if option.section else config, option.name)
    return values


def _entry(option: Option, value: Any, source: str | None) -> Entry:
    """An option with its default, which a recipe or file may set, and its aliases in brackets."""
    text, shown = option.help, _shown(value)
    if value != option.default:
        text = re.sub(r" ?\(default: [^()]*\)", "", text) + f" (default with {source}: {shown})"
    elif shown is not None and "(default" not in text:
        text += f" (default: {shown})"
    long = [alias for alias in option.aliases if alias.startswith("--")]
    aliases = f" [also {', '.join(long)}]" if long else ""
    if option.positional:
        return Entry(option.name, option.name.upper(), text, aliases)
    flags = [alias for alias in option.aliases if not alias.startswith("--")] + [option.flag]
    if option.kind is bool:
        return Entry(option.name, f"{option.flag}, --no-{option.flag[2:]}", text, aliases)
    return Entry(option.name, f"{', '.join(flags)} {_metavar(option.kind, option.name)}", text, aliases)


def _shown(value: Any) -> str | None:
    if value is None or value is dataclasses.MISSING or value is False:
        return None if value is not False else "off"
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "on" if value is True else str(value)


def _metavar(kind: Any, name: str) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(arguments) + "}"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        parts = [_metavar(a, name) for a in arguments if a is not type(None)]
        return parts[0] if len(parts) == 1 else "|".join(part.strip("{}") for part in parts)
    if typing.get_origin(kind) is tuple:
        return _metavar(arguments[0], name) + ",..."
    names = {int: "N", float: "X", str: METAVARS.get(name, "TEXT"), Duration: "DURATION"}
    return names.get(kind, "NAME=X,...")


def _common(cls: type, groups: Mapping[str, Sequence[Entry]]) -> dict[str, list[Entry]]:
    """The positional and own options of the verb, then the common ones; without aliases."""
    shown = [dataclasses.replace(entry, aliases="") for group in groups.values() for entry in group]
    entries = {entry.name: entry for entry in shown if entry.name not in getattr(cls, "REFUSED", ())}
    named = {entry.name for entry in groups.get("options", ())}
    own = [entry for entry in entries.values() if entry.name in named or not entry.left.startswith("-")]
    common = {"options": own} if own else {}
    for title, names in COMMON.items():
        group = [entries[name] for name in names if name in entries and entries[name] not in own]
        common |= {title: group} if group else {}
    return common


def _paragraphs(text: str) -> list[str]:
    paragraphs = [textwrap.wrap(part, WIDTH, break_on_hyphens=False) for part in text.split("\n\n")]
    return [line for number, part in enumerate(paragraphs) for line in ([""] if number else []) + part]


def _lines(entry: Entry) -> list[str]:
    left = f"  {entry.left}"
    texts = textwrap.wrap(entry.text + entry.aliases, WIDTH - COLUMN, break_on_hyphens=False)
    if len(left) >= COLUMN - 1:
        # A long list of choices continues in the next line, after a comma.
        choices = textwrap.wrap(left.replace(",", ", "), WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
        heads = [left] if len(left) <= WIDTH else choices
        return [*heads, *(" " * COLUMN + text for text in texts)]
    return [left.ljust(COLUMN) + texts[0], *(" " * COLUMN + text for text in texts[1:])]
