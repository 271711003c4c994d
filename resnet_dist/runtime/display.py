"""Show the progress of training: a bar on a terminal or in a notebook, otherwise lines, which train.log has too."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resnet_dist.files.run import append
from resnet_dist.runtime.bars import HALF_A_SECOND, Bar, bar, spinner
from resnet_dist.runtime.wording import printable


class Display:
    """Output of the main process; on other processes every method does nothing.

    Without `verbose`, nothing is shown, and lines are only written to the log.
    """

    def __init__(self, enabled: bool, verbose: bool = True) -> None:
        self.enabled = enabled
        self.console = Console(highlight=False, soft_wrap=True, quiet=not verbose)
        self._log: Path | None = None
        self._early: list[str] = []
        self._warned = False
        self._bar: Bar | None = None
        self._facts = ""
        self._drawn = -HALF_A_SECOND
        self._last_line = 0.0

    def log_to(self, file: Path) -> None:
        """Write every line to `file` too, earlier lines included."""
        self._log = file
        self._write("".join(self._early))

    def say(self, line: str) -> None:
        """Print a line of text."""
        if self.enabled:
            self.console.print(Text(printable(line)))
            self._write(printable(line) + "\n")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a two-column table."""
        if not self.enabled:
            return
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)
        self._write("".join(f"{name}: {value}\n" for name, value in rows))

    def _write(self, text: str) -> None:
        if self._log is None:
            self._early.append(text)
        elif text:
            try:
                append(self._log, text)
            except OSError as error:  # only a warning: the run continues
                if not self._warned:
                    print(f"WARNING: {self._log}: cannot be written ({error.strerror})", file=sys.stderr)
                self._warned = True

    @contextmanager
    def busy(self, doing: str, prints: bool = False) -> Iterator[None]:
        """Inside this context, a spinner says what is being done, unless a bar or another spinner is shown.

        `prints`: whether something prints meanwhile, other than `say`.
        """
        shown = spinner(self.console, doing, prints) if self.enabled and self._bar is None else None
        if shown is None:
            yield
            return
        self._bar = shown
        shown.start()
        try:
            yield
        finally:
            shown.stop()
            self._bar = None

    # An epoch is a `with display.epoch(...)`; `step` is called after every step, and `advance` at every poll.

    def epoch(self, title: str, steps: int, done: int = 0) -> Self:
        """Begin an epoch of `steps` optimizer steps, of which `done` were done before."""
        self._title, self._steps, self._images, self._facts = title, steps, 0, ""
        self._started = self._last_line = time.monotonic()
        self._drawn = -HALF_A_SECOND
        self._bar = bar(self.console, title, steps, done) if self.enabled else None
        return self

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def step(self, done: int) -> None:
        """Move the bar to `done` steps, at most every half second. The numbers beside it are those of the last poll."""
        now = time.monotonic()
        if self._bar is not None and now - self._drawn >= HALF_A_SECOND:
            self._drawn = now
            self._bar.update(done, self._facts)

    def advance(self, step: int, facts: Mapping[str, str], images: int) -> None:
        """Show the progress of the epoch after `images` more images; without a bar, a line every 30 seconds."""
        now = time.monotonic()
        self._images += images
        speed = f"{self._images / max(1e-9, now - self._started):.1f} images/s"
        self._facts = "  ".join([*(f"{name} {value}" for name, value in facts.items()), speed])
        self.step(step)
        if self._bar is None and self.enabled and now - self._last_line > 30:
            self._last_line = now
            self.say(f"{self._title}  step {step}/{self._steps}  {self._facts}")
