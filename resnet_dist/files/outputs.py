"""The rule for outputs: only files that this program wrote are replaced.

- An output folder must be new, empty, or an output of the same verb. The content of one file, the first that the verb
  writes, shows this. Files with other names are kept.
- An output file must be new, or an output of the same verb.
- Inside a run folder no symbolic link is followed, as it could lead out of the folder.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import MachineError, UsageError
from resnet_dist.files.reading import parse_json, read_bounded

MAX_MARK = 1 << 26  # bytes of the file that identifies an output
TEMPORARY = ".tmp-"  # prefix of a file that is being written
LOCK = ".lock"  # a file in the run folder; the process that writes the run holds a lock on it


@dataclass(frozen=True)
class Kind:
    """The kind of output that a verb writes into a folder.

    Attributes:
        name: its name in error messages, such as "an evaluation".
        mark: the file that is written first, or a glob pattern for it.
        is_ours: tells whether this program wrote a given file.
    """

    name: str
    mark: str
    is_ours: Callable[[Path], bool]

    def is_in(self, folder: Path) -> bool:
        """Whether the folder contains such an output."""
        return any(not file.is_symlink() and self.is_ours(file) for file in folder.glob(self.mark))


def json_with(*keys: str) -> Callable[[Path], bool]:
    """A test of whether a file is a JSON object with these keys."""

    def is_ours(file: Path) -> bool:
        try:
            values = parse_json(read_bounded(file, MAX_MARK))
        except (OSError, ValueError):
            return False
        return isinstance(values, dict) and values.keys() >= set(keys)

    return is_ours


def table_with(*columns: str) -> Callable[[Path], bool]:
    """A test of whether a file is a CSV file with exactly these columns."""

    def is_ours(file: Path) -> bool:
        try:
            with file.open("rb") as stream:
                return stream.readline(1 << 12).rstrip(b"\r\n") == ",".join(columns).encode()
        except OSError:
            return False

    return is_ours


def check_folder(folder: Path, kind: Kind, option: str = "--output-dir") -> None:
    """Check, before any work, that a verb may and can write into `folder`. Raises UsageError, MachineError."""
    try:
        if not is_free(folder) and not (folder.is_dir() and kind.is_in(folder)):
            raise UsageError(f"{option} {folder}: it exists and is not {kind.name}; choose another folder")
        parent = existing(folder)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be created ({error.strerror})") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{folder}: cannot be written ({parent} is not a writable folder)")


def make_folder(folder: Path, kind: Kind, option: str = "--output-dir") -> None:
    """Check and create the output folder of a verb. Raises UsageError, MachineError."""
    check_folder(folder, kind, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be created ({error.strerror})") from None


def check_file(file: Path, is_ours: Callable[[Path], bool], option: str) -> None:
    """Check that a verb may write `file`. Raises UsageError."""
    if os.path.lexists(file) and (file.is_symlink() or not is_ours(file)):
        raise UsageError(f"{option} {file}: it exists and was not written by this verb; choose another name")
    if not file.parent.is_dir():
        raise UsageError(f"{option} {file}: the folder {file.parent} does not exist")


def json_problems(option: str, file: str | None, *keys: str) -> Iterator[str]:
    """Problems of a JSON output file. An existing file with these keys is an earlier output and may be replaced."""
    try:
        if file is not None:
            check_file(Path(file), json_with(*keys), option)
    except UsageError as error:
        yield str(error)


def inside(run: Path, *names: str) -> Path:
    """A path inside a run folder. Raises UsageError if a symbolic link is on the way."""
    path = run
    for name in names:
        path /= name
        if path.is_symlink():
            raise UsageError(f"{path}: symbolic links are not allowed in a run folder; remove it")
    return path


def is_free(path: Path) -> bool:
    """Whether `path` does not exist or is a folder without files. Raises OSError.

    Lock files and unfinished files do not count.
    """
    if not os.path.lexists(path):
        return True
    if not path.is_dir():
        return False
    for folder, folders, names in os.walk(path, onerror=_raise):
        if any(name != LOCK and not name.startswith(TEMPORARY) for name in names):
            return False
        if any(Path(folder, name).is_symlink() for name in folders):
            return False
    return True


def _raise(error: OSError) -> None:
    raise error


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists. Raises OSError."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
