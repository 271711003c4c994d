"""Remove the images of an --exclude-list from a data set before it is split."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from resnet_dist.data.manifest import Row
from resnet_dist.data.same_file import Places
from resnet_dist.data.table import OTHER_DELIMITERS, read_table
from resnet_dist.errors import DataError
from resnet_dist.files.reading import read_bounded
from resnet_dist.runtime.wording import listed

MAX_LIST_BYTES = 1 << 28


def leave_out(rows: Sequence[Row], file: Path, root: Path) -> list[Row]:
    """Remove the rows whose files are in the list, however their paths are written. Paths are relative to `root`.

    Raises DataError if the list cannot be read, names a path that is not among the rows, or leaves a class empty.
    """
    place = Places(root)
    excluded = {place(path): path for path in read_paths(file)}
    remaining = [row for row in rows if place(row[0]) not in excluded]
    unknown = sorted(excluded[key] for key in excluded.keys() - {place(path) for path, _, _ in rows})
    if unknown:
        raise DataError(
            f"{file}: {listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the images; paths are "
            "relative to the root of the data, as in predictions.csv"
        )
    empty = sorted({label for _, label, _ in rows} - Counter(label for _, label, _ in remaining).keys())
    if empty:
        raise DataError(f"{file}: no image of class {listed(empty)} would be left")
    return remaining


def read_paths(file: Path) -> list[str]:
    """Read paths from a CSV with a column `path`, or from a text file with one path per line. Raises DataError."""
    try:
        text = read_bounded(file, MAX_LIST_BYTES).decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}) (--exclude-list)") from None
    except ValueError as error:
        raise DataError(f"{file}: not a list of paths ({error}) (--exclude-list)") from None
    if "\0" in text:
        raise DataError(
            f"{file}: it contains NUL characters, so it is not UTF-8 text: save it as UTF-8 (--exclude-list)"
        )
    lines = io.StringIO(text, newline="")
    if not _is_table(lines.readline()):
        lines.seek(0)
        return [line.rstrip("\r\n") for line in lines if line.strip()]
    lines.seek(0)
    paths = []
    for line, (path,) in read_table(f"{file} (--exclude-list)", lines, ("path",), ("path",)):
        if not path.strip():
            raise DataError(f"{file}, line {line}: the path is empty (--exclude-list)")
        paths.append(path)
    return paths


def _is_table(header: str) -> bool:
    """Whether a first line is a header with a column `path`, with any delimiter."""
    for delimiter in OTHER_DELIMITERS:
        header = header.replace(delimiter, ",")
    return "path" in {cell.strip(' "\r\n') for cell in header.split(",")}
