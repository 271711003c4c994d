"""Read untrusted files: up to a size limit, and as strict JSON."""

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 32  # our own files have a depth of 5


def read_bounded(file: Path, most: int) -> bytes:
    """The bytes of a file of at most `most` bytes.

    Raises OSError if it cannot be read, and ValueError if it is larger or not a regular file (a pipe or a device could
    be endless).
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
    """Parse JSON strictly. Raises ValueError.

    Unlike json.loads, it also refuses duplicate keys, numbers that are not finite (NaN, 1e999) and nesting deeper than
    MAX_DEPTH.
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
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
