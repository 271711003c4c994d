"""How names and lists are put to the user."""

import difflib
import unicodedata
from collections.abc import Sequence


def printable(text: str) -> str:
    """The text on one terminal: control characters and bytes that are no text become escapes such as \\x1b."""
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
    """'a', 'b' and 3 more."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def suggestion(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` where a known name is near, else nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
