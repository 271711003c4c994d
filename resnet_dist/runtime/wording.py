"""Format names, lists and counts in messages."""

import difflib
import os
import unicodedata
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path

MOST_NAMES = 10_000  # in a folder, that are compared with a missing one


def printable(text: str) -> str:
    """The text for a terminal: control characters and undecodable bytes become escapes such as \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(name: str) -> str:
    """The name on one line of a text file: control characters and line separators become escapes such as \\n."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in name
    )


def shortened(name: str, most: int) -> str:
    """A printable name of at most `most` characters."""
    clean = printable(name).replace("\n", " ")
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def listed(names: Sequence[str], most: int = 5) -> str:
    """A list such as `'a', 'b' and 3 more`."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest(name: str, names: Collection[str], cutoff: float = 0.6) -> str | None:
    """The name in `names` that was probably meant, or None.

    It is the only one that starts with `name`, or the longest one that `name` starts with, or the most similar one.
    """
    longer = [other for other in names if len(name) > 2 and other.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    shorter = [other for other in names if len(other) > 3 and name.startswith(other) and not other.startswith("--")]
    if shorter and not longer:
        return max(shorter, key=len)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return near[0] if near else None


def suggestion(name: str, names: Collection[str]) -> str:
    """The text `; did you mean 'x'?` if a name is similar, otherwise an empty string."""
    near = nearest(name, names)
    return f"; did you mean '{near}'?" if near else ""


def similar_path(path: Path) -> str:
    """The text `; did you mean 'runs/a'?` if the folder of a missing path holds a similar name, otherwise ""."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST_NAMES)]
    except OSError:
        return ""
    near = None if path.name in names else nearest(path.name, names)
    return f"; did you mean '{path.parent / near}'?" if near else ""


def counted(number: int, noun: str) -> str:
    """A number and a noun, such as `1 epoch`, `2 epochs`, `0 classes`."""
    return f"{number} {noun if number == 1 else _plural(noun)}"


def precision_name(mixed_precision: str) -> str:
    """The usual name of a value of --mixed-precision: float32 for `no`."""
    return "float32" if mixed_precision == "no" else mixed_precision


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "tch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
