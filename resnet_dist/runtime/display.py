"""Show the progress of training: a bar on a terminal, otherwise lines. The lines are also written to train.log."""

import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from resnet_dist.files.run import append
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
        self._bar: Progress | None = None
        self._task: TaskID | None = None
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

    # An epoch is a `with display.epoch(...)`; `advance` is called at every poll.

    def epoch(self, title: str, steps: int) -> Self:
        """Begin an epoch of `steps` optimizer steps."""
        self._title, self._steps, self._images = title, steps, 0
        self._started = self._last_line = time.monotonic()
        if self.enabled and _shows_bars(self.console):
            columns = [TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[facts]}")]
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=self.console, transient=True)
            self._task = self._bar.add_task(title, total=steps, facts="")
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
        self._bar = self._task = None

    def advance(self, step: int, facts: Mapping[str, str], images: int) -> None:
        """Show the progress of the epoch after `images` more images; without a terminal, a line every 30 seconds."""
        now = time.monotonic()
        self._images += images
        speed = f"{self._images / max(1e-9, now - self._started):.1f} images/s"
        text = "  ".join([*(f"{name} {value}" for name, value in facts.items()), speed])
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, facts=text)
        elif self.enabled and now - self._last_line > 30:
            self._last_line = now
            self.say(f"{self._title}  step {step}/{self._steps}  {text}")


def _shows_bars(console: Console) -> bool:
    """Whether a progress bar can be drawn: on a terminal, and in a notebook that has the widgets that rich uses."""
    in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
    return not console.quiet and (console.is_terminal or in_notebook)
