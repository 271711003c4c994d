"""CSV manifests: which images there are, of which class, in which split."""

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
# Marks without width that editors and spreadsheets leave: byte order mark, zero-width blanks, directions of writing.
UNSEEN = "\ufeff\u200b\u200c\u200d\u2060\u200e\u200f"
AROUND = re.compile(rf"^[\s{UNSEEN}]+|[\s{UNSEEN}]+\Z")

Row = tuple[str, str, str | None]  # path relative to the root or absolute, label, split


def read_manifest(file: Path, root: Path, exact: bool = False) -> tuple[list[Row], list[str]]:
    """The rows of a CSV with the columns path, label and maybe split, and what is to be said about them.

    Paths are relative to `root`. Labels are read without the blanks around them, unless the file is `exact`, written
    by this program. Raises DataError, with the line, for what cannot be read or has two meanings: above all two rows
    for one file, and two labels that look the same.
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
            f"{file}: {len(unsplit)} of {len(rows)} rows have no split, first line {unsplit[0]}: give all of them "
            "one, or none"
        )
    labels.check(str(file))
    paths = (path for path, _, _ in rows)
    repeated = None if exact else first_repeated(root, paths, len(rows), lambda position: rows[position][0])
    if repeated is not None:
        raise DataError(_repeated_text(file, *((lines[position], rows[position][0]) for position in repeated)))
    return rows, list(labels.notes(str(file)))


def _lines(file: Path, stream: TextIO) -> Iterator[str]:
    """The lines of a file, none of them so long that it could fill the memory."""
    while line := stream.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise DataError(f"{file}: a line of more than {MAX_LINE} characters, so not a manifest")
        yield line


def _row(file: Path, line: int, cells: tuple[str, ...], labels: "Labels") -> Row:
    path, label, split = cells
    name = labels.read(label, line)
    if not name or not path or path.isspace():
        raise DataError(f"{file}, line {line}: path and label must not be empty")
    if "\0" in path:
        raise DataError(f"{file}, line {line}: the path holds a NUL character: save the file as CSV in UTF-8")
    known = SPLIT_OF.get(split) or SPLIT_OF.get(split.strip().lower())
    if known is None and split.strip():
        raise DataError(f"{file}, line {line}: split '{split.strip()}' is not one of {', '.join(SPLIT_NAMES)}")
    return path, name, known


def _repeated_text(file: Path, first: tuple[int, str], again: tuple[int, str]) -> str:
    """Two rows for one file, in words."""
    if first[1] == again[1]:
        return f"{file}, line {again[0]}: '{again[1]}' is listed more than once, first in line {first[0]}; keep one row"
    return (
        f"{file}, line {again[0]}: '{again[1]}' is the same file as '{first[1]}' in line {first[0]}: an image listed "
        "more than once; keep one row"
    )


class Labels:
    """Labels as a user wrote them, and as they are read: without blanks and unseen marks around them.

    One str is kept for each spelling, not for each image.
    """

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self._read: dict[str, str] = {}
        self._line: dict[str, int] = {}

    def read(self, text: str, line: int) -> str:
        """The label that a cell gives; empty where it holds nothing but blanks."""
        label = self._read.get(text)
        if label is None:
            label = self._read[text] = sys.intern(text if self._exact else stripped(text))
            self._line[text] = line
        return label

    def check(self, name: str) -> None:
        """Raises DataError where two labels look the same: inner blanks or the encoding of letters differ."""
        alike = None if self._exact else lookalikes(self._read.values())
        if alike is not None:
            line_of = {label: self._line[text] for text, label in reversed(self._read.items())}
            first, again = ((label, line_of[label]) for label in alike)
            raise DataError(
                f"{name}, line {again[1]}: the label {again[0]!a} looks the same as {first[0]!a} in line "
                f"{first[1]}; write one of them throughout"
            )

    def notes(self, name: str) -> Iterator[str]:
        """A warning where blanks were left out."""
        changed = [text for text, label in self._read.items() if text != label]
        if changed:
            more = f" and {len(changed) - 1} other spellings" if len(changed) > 1 else ""
            yield (
                f"WARNING: {name}: labels are read without the blanks around them, first in line "
                f"{self._line[changed[0]]}: {changed[0]!a}{more}"
            )


def stripped(label: str) -> str:
    """A label without the blanks and unseen marks around it."""
    return AROUND.sub("", label)


def appearance(label: str) -> str:
    """What a person sees of a label: equal where only the kind of blanks or the encoding of letters differs."""
    seen = unicodedata.normalize("NFC", label.translate(dict.fromkeys(map(ord, UNSEEN))))
    return " ".join(seen.split())


def lookalikes(labels: Iterable[str]) -> tuple[str, str] | None:
    """The first two different labels of one appearance, or None."""
    first: dict[str, str] = {}
    for label in labels:
        other = first.setdefault(appearance(label), label)
        if other != label:
            return other, label
    return None
