"""Find paths that lead to the same file in spite of different spelling, links or case."""

import functools
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Protocol

import numpy as np

from resnet_dist.errors import DataError

KEPT_FOLDERS = 1 << 16
NO_NAMES = ("", os.curdir, os.pardir)
THREADS = 16  # most of the time they wait for a network file system


class Paths(Protocol):
    """Paths by position: a list or a `PathTable`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


class Places:
    """Resolves paths to (real folder, name). Each folder is resolved on the disk once."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.real_folder = functools.lru_cache(KEPT_FOLDERS)(self._look_up)

    def _look_up(self, folder: str) -> str:
        return os.path.realpath(self.root / folder)

    def __call__(self, path: str) -> tuple[str, str]:
        """(real folder, name) of a path that is absolute or relative to the root; links to files are not followed."""
        folder, name = os.path.split(path)
        if name in NO_NAMES:
            return self.real_folder(path), ""
        return self.real_folder(folder), name


def first_repeated(
    root: Path, paths: Iterable[str], count: int, path_at: Callable[[int], str]
) -> tuple[int, int] | None:
    """The positions (first, repeated) of the earliest path that leads to the same file as a path before it, or None.

    It sees `./a`, `x/../a`, absolute paths and links to folders. If the file system ignores case or Unicode
    composition, it sees names that differ only in these. It does not see links to files (see `of_one_file`). It needs
    8 bytes of memory for each of the `count` paths.
    """
    place = Places(root)
    folder_key = functools.lru_cache(KEPT_FOLDERS)(lambda folder: hash(_folded(place.real_folder(folder))))

    def key(path: str) -> int:
        name = path[path.rfind(os.sep) + 1 :]
        if name in NO_NAMES:
            return hash((folder_key(path), ""))
        return hash((folder_key(path[: len(path) - len(name)]), name.lower() if name.isascii() else _folded(name)))

    candidates = _equal(np.fromiter(map(key, paths), np.int64, count))
    repeated = [pair for pair in candidates if _is_one_file(place, path_at(pair[0]), path_at(pair[1]))]
    return min(repeated, key=lambda pair: (pair[1], pair[0]), default=None)


def _folded(name: str) -> str:
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _is_one_file(place: Places, one: str, other: str) -> bool:
    return place(one) == place(other) or is_same(place.root / one, place.root / other)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one existing file."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def refuse_links(name: str, root: Path, paths: Paths) -> None:
    """Raise DataError, beginning with `name`, if two of the paths are links to one file."""
    for one, other in of_one_file(identities(root, paths)).tolist():
        if is_same(root / paths[one], root / paths[other]):
            raise DataError(
                f"{name}: '{paths[one]}' and '{paths[other]}' are links to one file: an image listed more than once; "
                "keep one of them"
            )


def identity(file: Path) -> tuple[int, int]:
    """Device and inode of the file that a path leads to; (0, 0) if there is none."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def identities(root: Path, paths: Paths) -> np.ndarray:
    """Device and inode of every path, uint64 (n, 2). Asks the file system once per path."""

    def part(rows: np.ndarray) -> np.ndarray:
        return as_identities([identity(root / paths[int(row)]) for row in rows])

    with ThreadPoolExecutor(THREADS) as pool:
        return np.concatenate(list(pool.map(part, np.array_split(np.arange(len(paths)), THREADS))))


def as_identities(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Devices and inodes as uint64 (n, 2)."""
    return np.array(pairs, np.uint64).reshape(-1, 2)


def of_one_file(identities: np.ndarray) -> np.ndarray:
    """Pairs (first, position) of links to one file, int64 (k, 2), from devices and inodes, uint64 (n, 2).

    Each position is paired with the first that has its device and inode. A file without an inode (0) is in no pair.
    Check a pair with `is_same` before refusing it: some network file systems reuse inodes.
    """
    with_inode = np.flatnonzero(identities[:, 1])
    _, at, number = np.unique(identities[with_inode], axis=0, return_index=True, return_inverse=True)
    firsts = with_inode[at[number.reshape(-1)]]
    again = firsts != with_inode
    return np.stack([firsts[again], with_inode[again]], axis=1)


def _equal(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of positions with equal values, the smaller position first."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]) + 1
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        yield from combinations(order[start:end].tolist(), 2)
