"""What the fields of config classes have beside a type and a default: other spellings, and a range."""

import math
from collections.abc import Iterator
from dataclasses import field
from typing import Any, TypeVar

from resnet_dist.errors import UsageError

T = TypeVar("T")


def option(default: Any, *aliases: str, positional: bool = False) -> Any:
    """A dataclass field with the other spellings that fingers know (`--optimizer` for `--opt`, `-b`)."""
    return field(default=default, metadata={"aliases": aliases, "positional": positional})


def required(value: T | None, name: str) -> T:
    """The value of a setting that must be given. Raises UsageError if it is missing.

    `problems()` has reported it by then, together with all others, unless the config was made without that check.
    """
    if value is None:
        raise UsageError(f"{name} is missing")
    return value


def out_of_range(cfg: Any, low: float, high: float, *names: str, open_low: bool = False) -> Iterator[str]:
    """One line for each named field that is set and not within [low, high] (or (low, high] if open_low)."""
    for name in names:
        value = getattr(cfg, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is None or (low < item <= high) or (item == low and not open_low):
                continue
            wanted = f"above {low:g}" if open_low else f"at least {low:g}"
            wanted += "" if high == math.inf else f" and at most {high:g}"
            shown = str(item) if isinstance(item, int) else f"{item:g}"
            yield f"--{name.replace('_', '-')} {shown}: must be {wanted}"
