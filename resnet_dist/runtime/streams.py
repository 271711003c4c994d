"""Standard streams that also work if they are closed, full, a broken pipe or ASCII only."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from resnet_dist.errors import MachineError

T = TypeVar("T")


class Output(io.TextIOWrapper):
    """A stream that never raises OSError.

    If standard output cannot be written (a full disk), it raises MachineError. After a broken pipe, and always for
    standard error, the program continues and its output is discarded.
    """

    is_required = False

    def write(self, text: str) -> int:
        """Like io.TextIOWrapper."""
        return self._try(super().write, text) or len(text)

    def flush(self) -> None:
        """Like io.TextIOWrapper."""
        self._try(super().flush)

    def _try(self, call: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return call(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # discards the rest of the output
            if self.is_required and not isinstance(error, BrokenPipeError):
                raise MachineError(f"standard output: cannot be written ({error.strerror})") from None
            return None


def prepare() -> None:
    """Replace the standard streams by safe ones. Call it once, before any file is opened.

    A closed stream is connected to the null device, so that no opened file gets its number. Characters that the
    encoding does not have are written as escapes.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is that of the stream
            setattr(sys, name, io.TextIOWrapper(os.fdopen(opened, "rb" if name == "stdin" else "wb")))
    for name in ("stdout", "stderr"):
        stream: io.TextIOWrapper = getattr(sys, name)
        encoding, by_line, at_once = stream.encoding, stream.line_buffering, stream.write_through
        output = Output(stream.detach(), encoding, "backslashreplace", None, by_line, at_once)
        output.is_required = name == "stdout"
        setattr(sys, name, output)
