"""Images that a list takes out of a data set before it is split."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from resnet_dist.errors import DataError
from resnet_dist.reading import read_bounded
from resnet_dist.wording import listed

MAX_LIST_BYTES = 1 << 28
Row = tuple[str, str, str | None]  # path relative to the root, label, split


def leave_out(rows: Sequence[Row], file: Path) -> list[Row]:
    """The rows without those whose paths the list names.

    Raises DataError where the list cannot be read, names a path that is not there, or leaves a class empty.
    """
    excluded = {os.path.normpath(path) for path in read_paths(file)}
    unknown = sorted(excluded - {os.path.normpath(path) for path, _, _ in rows})
    if unknown:
        raise DataError(
            f"{file}: {listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the images; paths are "
            "relative to the root of the data, as in predictions.csv"
        )
    kept = [row for row in rows if os.path.normpath(row[0]) not in excluded]
    empty = sorted({label for _, label, _ in rows} - Counter(label for _, label, _ in kept).keys())
    if empty:
        raise DataError(f"{file}: leaves no image of class {listed(empty)}")
    return kept


def read_paths(file: Path) -> list[str]:
    """The paths of a CSV with a column `path`, or of a text file with one per line. Raises DataError."""
    try:
        text = read_bounded(file, MAX_LIST_BYTES).decode("utf-8-sig", errors="surrogateescape")
        lines = text.splitlines(keepends=True)
        columns = next(csv.reader(lines[:1]), [])
        if "path" in columns:
            return [row["path"] for row in csv.DictReader(lines) if row["path"]]
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}) (--exclude-list)") from None
    except (ValueError, csv.Error) as error:
        raise DataError(f"{file}: not a list of paths ({error}) (--exclude-list)") from None
    return [line.rstrip("\r\n") for line in lines if line.strip()]
