"""The errors that users see. Each is one line on the terminal and one documented exit code.

ResnetDistError            1   (itself only for a bug of the main process, raised on the others)
├── UsageError             2   an option, a config file or a combination of them is wrong
├── DataError              3   the images, labels or manifest are wrong
├── MachineError           4   disk, permissions, network, device or launcher
├── NonFiniteError         5   the loss or a gradient became NaN or infinite
├── ArtifactError          6   a checkpoint, weights file or exported model cannot be used
└── Preempted             75   stopped by a signal; a checkpoint to resume from is written (EX_TEMPFAIL)
"""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

OPTION = re.compile(r"(?<![\w/.-])--(no-)?([a-z][a-z0-9-]*)")
VALUE = re.compile(r"[ =]([^\s:;,()]+)(?=[:;,)]|\.?$)", re.MULTILINE)  # the last word of a clause
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def as_keywords(text: str) -> str:
    """A text that names options, with Python keywords in their place: `--img-size 0: ...` -> `img_size=0: ...`."""
    return re.sub(f"{OPTION.pattern}(?:{VALUE.pattern})?", _keyword, text, flags=re.MULTILINE)


def _keyword(option: re.Match[str]) -> str:
    negated, name, value = option.groups()
    keyword = name.replace("-", "_") + ("=False" if negated else "")
    if value is None or negated:
        return keyword + (f" {value}" if value else "")
    is_text = re.fullmatch(r"[\w.+/-]+", value) and not re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|True|False|None", value)
    return f"{keyword}='{value}'" if is_text else f"{keyword}={value}"


class ResnetDistError(Exception):
    """Root of the tree. `exit_code` is what the process returns; `shared` means that every process raises it."""

    exit_code = 1
    shared = False

    def reword(self, words: Callable[[str], str]) -> Self:
        """Put the text in other words, such as `as_keywords`. Returns the error itself."""
        self.args = tuple(words(part) if isinstance(part, str) else part for part in self.args)
        return self

    def in_python(self) -> Self:
        """Let the text name settings by their Python keywords, not by their options. Returns the error itself."""
        return self.reword(as_keywords)


class UsageError(ResnetDistError):
    """An option, a config file or a combination of them is wrong. `problems` lists everything that is wrong."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def reword(self, words: Callable[[str], str]) -> Self:
        """Put every problem in other words. Returns the error itself."""
        self.problems = [words(problem) for problem in self.problems]
        return super().reword(words)


class DataError(ResnetDistError):
    """The images, their labels or the manifest are wrong."""

    exit_code = 3


class MachineError(ResnetDistError):
    """Disk, permissions, network, device or launcher."""

    exit_code = 4


def disk_error(error: OSError) -> MachineError | None:
    """The error to show if a disk or device cannot be written; None for any other cause."""
    if error.errno not in DISK_ERRORS:
        return None
    return MachineError(f"{error.filename or 'the output'}: cannot be written ({error.strerror})")


class NonFiniteError(ResnetDistError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 5


class ArtifactError(ResnetDistError):
    """A checkpoint, weights file or exported model cannot be used."""

    exit_code = 6


class Preempted(ResnetDistError):  # noqa: N818 - nobody's mistake
    """Stopped by a signal; a checkpoint to resume from is written."""

    exit_code = 75
    shared = True


@contextmanager
def python_errors() -> Iterator[None]:
    """Within it, errors name settings by their Python keywords, and a full disk is a MachineError."""
    try:
        yield
    except ResnetDistError as error:
        error.in_python()
        raise
    except OSError as error:
        if (ours := disk_error(error)) is None:
            raise
        raise ours from None
