"""Standard input, output and error of the program, whatever they are: closed, full, a broken pipe, or ASCII only."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from resnet_dist.errors import MachineError

T = TypeVar("T")


class Output(io.TextIOWrapper):
    """A stream that never raises OSError.

    What cannot be written to standard output, as on a full disk, is a MachineError. Where nobody reads any more (a
    broken pipe), and always for standard error, the program goes on and what it writes goes nowhere.
    """

    is_required = False

    def write(self, text: str) -> int:
        """As of every text stream."""
        return self._try(super().write, text) or len(text)

    def flush(self) -> None:
        """As of every text stream."""
        self._try(super().flush)

    def _try(self, call: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return call(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # takes what is still to be written
            if self.is_required and not isinstance(error, BrokenPipeError):
                raise MachineError(f"standard output: cannot be written ({error.strerror})") from None
            return None


def prepare() -> None:
    """Make the streams safe to use, once and before anything opens a file.

    A closed stream gets the null device, so that no file of ours takes its number; names that the encoding of a stream
    has no signs for are written as escapes.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, so that of the stream
            setattr(sys, name, io.TextIOWrapper(os.fdopen(opened, "rb" if name == "stdin" else "wb")))
    for name in ("stdout", "stderr"):
        stream: io.TextIOWrapper = getattr(sys, name)
        encoding, by_line, at_once = stream.encoding, stream.line_buffering, stream.write_through
        output = Output(stream.detach(), encoding, "backslashreplace", None, by_line, at_once)
        output.is_required = name == "stdout"
        setattr(sys, name, output)
