"""Files that somebody else may have written: read whole, but only up to a size, and as strict JSON."""

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 32  # our own files nest to five


def read_bounded(file: Path, most: int) -> bytes:
    """The bytes of a file of at most `most` bytes.

    Raises OSError where it cannot be read, ValueError where it is larger, or no file at all but a pipe or a device,
    which would never end.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file" if not stat.S_ISDIR(status.st_mode) else "a folder, not a file")
    if status.st_size > most:
        raise ValueError(f"larger than {most >> 20} MiB")
    with file.open("rb") as stream:
        data = stream.read(status.st_size + 1)
    if len(data) > status.st_size:
        raise ValueError("it grew while it was read")
    return data


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError for whatever is not plain JSON.

    Stricter than json.loads: a key that comes twice, numbers that are not finite (NaN, 1e999) and nesting beyond
    MAX_DEPTH are refused.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a number that can be kept")
    return value


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
