"""Read CSV tables that a user wrote: columns by name, every row with its line number."""

import csv
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

from resnet_dist.errors import DataError
from resnet_dist.runtime.wording import listed, shortened

OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_table(
    name: str, lines: Iterable[str], columns: Sequence[str], needed: Sequence[str]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The line number and the cells of every row of a CSV with a header.

    Yields the cells of `columns`, in that order, "" for a column that the header does not have. A row of several lines
    (a quoted line feed) has the number of its first line. Lines without text are skipped: spaces, or empty cells
    (`,,`), which spreadsheets write after the last row. `name` is the file's name in errors.

    Raises DataError, with the line, if a column of `needed` is missing, a column of `columns` is there twice, a row has
    more or fewer cells than the header, or the text is not CSV.
    """
    reader = csv.reader(lines, strict=True)
    width, line = 0, 1
    pick: Callable[[Sequence[str]], tuple[str, ...]] | None = None
    try:
        for cells in reader:
            if not any(map(str.strip, cells)):
                pass
            elif pick is not None and len(cells) == width:
                yield line, pick(cells)
            elif pick is None:
                width, pick = len(cells), _picker(_positions(f"{name}, line {line}", cells, columns, needed))
            else:
                raise DataError(
                    f"{name}, line {line}: {len(cells)} cells, but the header has {width} columns; a path or label "
                    'that holds a comma must be in double quotes ("a, b.jpg")'
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}, line {line}: not CSV ({error})") from None
    if pick is None:
        raise DataError(f"{name}: empty; a header with {_named(needed)} is needed in its first line")


def _picker(positions: Sequence[int | None]) -> Callable[[Sequence[str]], tuple[str, ...]]:
    """A function from a row to its cells at these positions, "" for None."""
    if None not in positions and len(positions) > 1:
        return operator.itemgetter(*positions)  # faster, which a million rows need
    return lambda cells: tuple(["" if position is None else cells[position] for position in positions])


def _positions(header: str, cells: Sequence[str], columns: Sequence[str], needed: Sequence[str]) -> list[int | None]:
    """The position of each column in a row; None for a column that is not there."""
    names = [cell.strip() for cell in cells]
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise DataError(f"{header}: the column {listed(twice)} is in the header more than once")
    if not set(needed) <= set(names):
        raise DataError(f"{header}: the header needs {_named(needed)}; {_instead(cells, needed)}")
    return [names.index(column) if column in names else None for column in columns]


def _instead(cells: Sequence[str], needed: Sequence[str]) -> str:
    """A text about the columns of the header, or the likely reason why the needed columns are missing."""
    text = ",".join(cells)
    if "\0" in text:
        return "this file is not UTF-8 text (UTF-16?): save it as CSV in UTF-8"
    for delimiter, word in OTHER_DELIMITERS.items():
        if set(needed) <= {part.strip(' "') for part in text.split(delimiter)}:
            return f"its columns are separated by {word}: save it with commas instead"
    return f"it has {shortened(text, 80)}"


def _named(columns: Sequence[str]) -> str:
    return f"the column{'s' if len(columns) > 1 else ''} {','.join(columns)}"
