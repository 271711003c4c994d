"""Read CSV manifests: paths, labels and splits of images."""

import re
import sys
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from resnet_dist.data.same_file import first_repeated
from resnet_dist.data.table import read_table
from resnet_dist.errors import DataError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SPLIT_OF = {spelling: split for split, spellings in SPLIT_NAMES.items() for spelling in spellings}
MAX_LINE = 1 << 20
# Invisible characters that editors and spreadsheets leave: byte order mark, zero-width spaces, text direction.
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060\u200e\u200f"
AROUND = re.compile(rf"^[\s{INVISIBLE}]+|[\s{INVISIBLE}]+\Z")

Row = tuple[str, str, str | None]  # path relative to the root or absolute, label, split


def read_manifest(file: Path, root: Path, exact: bool = False) -> tuple[list[Row], list[str]]:
    """The rows of a CSV with the columns path, label and optionally split, and warnings about them.

    Paths are relative to `root`. Spaces around labels are removed, unless the file is `exact` (written by this
    program). Raises DataError, with the line, if a row cannot be read or is ambiguous: two rows for one file, or two
    labels that look the same.
    """
    rows: list[Row] = []
    lines = array("q")
    labels = Labels(exact)
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            for line, cells in read_table(
                str(file), _lines(file, stream), ("path", "label", "split"), ("path", "label")
            ):
                rows.append(_row(file, line, cells, labels))
                lines.append(line)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    unsplit = [line for line, (_, _, split) in zip(lines, rows, strict=True) if split is None]
    if 0 < len(unsplit) < len(rows):
        raise DataError(
            f"{file}: {len(unsplit)} of {len(rows)} rows have no split, the first in line {unsplit[0]}: give "
            "every row a split, or none"
        )
    labels.check(str(file))
    paths = (path for path, _, _ in rows)
    repeated = None if exact else first_repeated(root, paths, len(rows), lambda position: rows[position][0])
    if repeated is not None:
        raise DataError(_repeated_text(file, *((lines[position], rows[position][0]) for position in repeated)))
    return rows, list(labels.notes(str(file)))


def _lines(file: Path, stream: TextIO) -> Iterator[str]:
    """The lines of a file. Raises DataError for a line so long that it could fill the memory."""
    while line := stream.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise DataError(f"{file}: a line of more than {MAX_LINE} characters: not a manifest")
        yield line


def _row(file: Path, line: int, cells: tuple[str, ...], labels: "Labels") -> Row:
    path, label, split = cells
    name = labels.read(label, line)
    if not name or not path or path.isspace():
        raise DataError(f"{file}, line {line}: path and label must not be empty")
    if "\0" in path:
        raise DataError(f"{file}, line {line}: the path contains a NUL character: save the file as CSV in UTF-8")
    part = SPLIT_OF.get(split) or SPLIT_OF.get(split.strip().lower())
    if part is None and split.strip():
        raise DataError(f"{file}, line {line}: split '{split.strip()}' is not one of {', '.join(SPLIT_NAMES)}")
    return path, name, part


def _repeated_text(file: Path, first: tuple[int, str], again: tuple[int, str]) -> str:
    """The error message for two rows of one file."""
    if first[1] == again[1]:
        return f"{file}, line {again[0]}: '{again[1]}' is listed more than once, first in line {first[0]}; keep one row"
    return (
        f"{file}, line {again[0]}: '{again[1]}' is the same file as '{first[1]}' in line {first[0]}: an image listed "
        "more than once; keep one row"
    )


class Labels:
    """Labels from a file, without the spaces and invisible characters around them. Each spelling is stored once."""

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self._read: dict[str, str] = {}
        self._line: dict[str, int] = {}

    def read(self, text: str, line: int) -> str:
        """The label in a cell; empty if the cell holds only spaces."""
        label = self._read.get(text)
        if label is None:
            label = self._read[text] = sys.intern(text if self._exact else stripped(text))
            self._line[text] = line
        return label

    def check(self, name: str) -> None:
        """Raise DataError if two labels look the same but differ in inner spaces or in the encoding of letters."""
        alike = None if self._exact else lookalikes(self._read.values())
        if alike is not None:
            line_of = {label: self._line[text] for text, label in reversed(self._read.items())}
            first, again = ((label, line_of[label]) for label in alike)
            raise DataError(
                f"{name}, line {again[1]}: the label {again[0]!a} looks the same as {first[0]!a} in line "
                f"{first[1]}; use the same one everywhere"
            )

    def notes(self, name: str) -> Iterator[str]:
        """A warning if spaces were removed."""
        changed = [text for text, label in self._read.items() if text != label]
        if changed:
            more = f" and {len(changed) - 1} other spellings" if len(changed) > 1 else ""
            yield (
                f"WARNING: {name}: spaces around labels are removed, first in line "
                f"{self._line[changed[0]]}: {changed[0]!a}{more}"
            )


def stripped(label: str) -> str:
    """A label without spaces and invisible characters around it."""
    return AROUND.sub("", label)


def appearance(label: str) -> str:
    """A label as a person sees it: equal for labels that differ only in kinds of spaces or encoding of letters."""
    seen = unicodedata.normalize("NFC", label.translate(dict.fromkeys(map(ord, INVISIBLE))))
    return " ".join(seen.split())


def lookalikes(labels: Iterable[str]) -> tuple[str, str] | None:
    """The first two different labels that look the same, or None."""
    first: dict[str, str] = {}
    for label in labels:
        other = first.setdefault(appearance(label), label)
        if other != label:
            return other, label
    return None
