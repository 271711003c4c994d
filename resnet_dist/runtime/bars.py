"""Progress that moves in place: a bar for an epoch and a spinner for everything else, on a terminal or in a notebook.

They are drawn from what the host knows, so that drawing never waits for a GPU.
"""

import time
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.text import Text

HALF_A_SECOND = 0.5  # between two drawings
SPEED_OF = 600.0  # seconds of steps from which the remaining time is estimated, because one step can take a minute


class Bar(Protocol):
    """Something that moves while work is done."""

    def start(self) -> None:
        """Begin to draw."""

    def stop(self) -> None:
        """Remove it from the screen."""

    def update(self, done: int, facts: str) -> None:
        """Show that `done` steps are done, and some facts."""


def bar(console: Console, title: str, steps: int, done: int) -> Bar | None:
    """A bar for `steps` steps of which `done` are done already; None if the output is neither terminal nor notebook."""
    if console.quiet:
        return None
    if console.is_jupyter:
        return NotebookLine(title, steps, done)
    return TerminalBar(console, title, steps, done) if console.is_terminal else None


def spinner(console: Console, text: str, prints: bool) -> Bar | None:
    """A spinner beside a text; None if the output is neither terminal nor notebook. `prints`: as in `Display.busy`."""
    if console.quiet:
        return None
    if console.is_jupyter:
        return NotebookLine(text, 0, 0)
    return TerminalSpinner(console, text, prints) if console.is_terminal else None


class TerminalBar:
    """A bar with a spinner, the facts and the time that remains."""

    def __init__(self, console: Console, title: str, steps: int, done: int) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.completed}/{task.total}  {task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
        )
        self.progress = Progress(
            *columns, console=console, transient=True, refresh_per_second=4, speed_estimate_period=SPEED_OF
        )
        self.task = self.progress.add_task(title, total=steps, completed=done, facts="")
        self.start, self.stop = self.progress.start, self.progress.stop

    def update(self, done: int, facts: str) -> None:
        """Show that `done` steps are done, and some facts."""
        self.progress.update(self.task, completed=done, facts=facts)


class TerminalSpinner:
    """A spinner beside a text. With `prints`, sys.stdout and sys.stderr print above it.

    Otherwise they stay as they are, because a module that is imported meanwhile may keep what it finds there.
    """

    def __init__(self, console: Console, text: str, prints: bool) -> None:
        live = Live(
            Spinner("dots", Text(text)),
            console=console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=prints,
            redirect_stderr=prints,
        )
        self.start, self.stop = live.start, live.stop

    def update(self, done: int, facts: str) -> None:
        """Nothing: the spinner turns by itself."""


class NotebookLine:
    """One line of text that is replaced in place. It needs no widgets, only IPython, which every notebook has."""

    def __init__(self, title: str, steps: int, done: int) -> None:
        self.title, self.steps, self.first = title, steps, done
        self.started = time.monotonic()
        self._handle: Any = None

    def start(self) -> None:
        """Show the line."""
        from IPython.display import display

        self._handle = display(self._shown(self.title), display_id=True)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Empty the line."""
        self._handle.update(self._shown(""))

    def update(self, done: int, facts: str) -> None:
        """Show that `done` steps are done, and some facts."""
        share = done / self.steps
        left = (time.monotonic() - self.started) / max(1, done - self.first) * (self.steps - done)
        drawn = "█" * round(30 * share)
        self._handle.update(
            self._shown(f"{self.title}  {drawn:░<30}  {done}/{self.steps}  {facts}  {as_clock(left)} left")
        )

    @staticmethod
    def _shown(text: str) -> Any:
        from IPython.display import Pretty

        return Pretty(text)  # type: ignore[no-untyped-call]


def as_clock(seconds: float) -> str:
    """Seconds as M:SS or H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
