"""One rule for everything that is written: only what this program wrote is ever replaced.

- A folder to write into must be new, empty, or hold what the same verb wrote before. One file in it, the first that the
  verb writes, shows that by its content. Files under other names than the verb's stay as they are.
- A file to write must be new, or one that the same verb wrote before.
- Below a run folder no symbolic link is followed: it would lead out of it.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import MachineError, UsageError
from resnet_dist.files.reading import parse_json, read_bounded

MAX_MARK = 1 << 26  # bytes of a file by which an output is recognised
TEMPORARY = ".tmp-"  # begins the name of a file that is still being written
LOCK = ".lock"  # a file of a run folder that the process that writes the run keeps locked


@dataclass(frozen=True)
class Kind:
    """What a verb writes into a folder.

    Attributes:
        name: what errors call it, such as "an evaluation".
        mark: the file of the folder that is written first, or a pattern that finds it.
        is_ours: whether this program wrote the file that it is given.
    """

    name: str
    mark: str
    is_ours: Callable[[Path], bool]

    def is_in(self, folder: Path) -> bool:
        """Whether the folder holds such an output."""
        return any(not file.is_symlink() and self.is_ours(file) for file in folder.glob(self.mark))


def json_with(*keys: str) -> Callable[[Path], bool]:
    """Whether a file is a JSON object that has these keys."""

    def is_ours(file: Path) -> bool:
        try:
            values = parse_json(read_bounded(file, MAX_MARK))
        except (OSError, ValueError):
            return False
        return isinstance(values, dict) and values.keys() >= set(keys)

    return is_ours


def table_with(*columns: str) -> Callable[[Path], bool]:
    """Whether a file is a CSV file whose first line names just these columns."""

    def is_ours(file: Path) -> bool:
        try:
            with file.open("rb") as stream:
                return stream.readline(1 << 12).rstrip(b"\r\n") == ",".join(columns).encode()
        except OSError:
            return False

    return is_ours


def check_folder(folder: Path, kind: Kind, option: str = "--output-dir") -> None:
    """See before any work that a verb may write into `folder`, and can. Raises UsageError, MachineError."""
    try:
        if not is_free(folder) and not (folder.is_dir() and kind.is_in(folder)):
            raise UsageError(f"{option} {folder}: it exists and is not {kind.name}; choose another folder")
        above = existing(folder)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made into a folder ({error.strerror})") from None
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise MachineError(f"{folder}: cannot be written ({above} is not a folder that can be written)")


def make_folder(folder: Path, kind: Kind, option: str = "--output-dir") -> None:
    """Make a folder that a verb may write into. Raises UsageError, MachineError."""
    check_folder(folder, kind, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made into a folder ({error.strerror})") from None


def check_file(file: Path, is_ours: Callable[[Path], bool], option: str) -> None:
    """See that a verb may write `file`. Raises UsageError."""
    if os.path.lexists(file) and (file.is_symlink() or not is_ours(file)):
        raise UsageError(f"{option} {file}: it exists and was not written by this verb; choose another name")
    if not file.parent.is_dir():
        raise UsageError(f"{option} {file}: there is no folder {file.parent}")


def json_problems(option: str, file: str | None, *keys: str) -> Iterator[str]:
    """What is wrong with a JSON file that is written at the end of a verb; an older one has `keys` and is replaced."""
    try:
        if file is not None:
            check_file(Path(file), json_with(*keys), option)
    except UsageError as error:
        yield str(error)


def inside(run: Path, *names: str) -> Path:
    """A path below a run folder that leads through no symbolic link. Raises UsageError where one is in the way."""
    path = run
    for name in names:
        path /= name
        if path.is_symlink():
            raise UsageError(f"{path}: a symbolic link; nothing in a run folder is written through one, so remove it")
    return path


def is_free(path: Path) -> bool:
    """Whether nothing is at `path`, or a folder in which there is no file. Raises OSError.

    Locks and files that were never finished do not count.
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
