"""The bar and the spinner: they move, tell the time that is left, and are silent where nobody can see them move."""

import io
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console

from resnet_dist.runtime.bars import TerminalBar
from resnet_dist.runtime.display import Display


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("resnet_dist.runtime.display.time", SimpleNamespace(monotonic=clock))
    return clock


def on_terminal(clock: Clock) -> tuple[Display, io.StringIO]:
    display, stream = Display(enabled=True), io.StringIO()
    display.console = Console(file=stream, force_terminal=True, width=120, get_time=clock)
    return display, stream


def test_the_bar_moves_with_every_slow_step_and_estimates_after_the_second(clock: Clock) -> None:
    display, stream = on_terminal(clock)
    with display.epoch("epoch 1/3", 10):
        assert isinstance(display._bar, TerminalBar)
        task = display._bar.progress.tasks[0]
        seen = []
        for step in (1, 2, 3):
            clock.now += 40  # longer than the 30 seconds from which rich estimates by default
            display.step(step)
            seen.append((task.completed, task.time_remaining))
    assert seen == [(1, None), (2, 8 * 40), (3, 7 * 40)]
    assert "epoch 1/3" in stream.getvalue()


def test_fast_steps_draw_twice_a_second(clock: Clock) -> None:
    display, _ = on_terminal(clock)
    with display.epoch("epoch 1/3", 1000, done=100):
        assert isinstance(display._bar, TerminalBar)
        task = display._bar.progress.tasks[0]
        drawn = {task.completed}
        for step in range(101, 201):
            clock.now += 0.0625
            display.step(step)
            drawn.add(task.completed)
    assert drawn == {100, *range(101, 201, 8)}


def test_the_facts_of_the_last_poll_stay_beside_the_bar(clock: Clock) -> None:
    display, _ = on_terminal(clock)
    with display.epoch("epoch 1/3", 10):
        assert isinstance(display._bar, TerminalBar)
        clock.now += 1
        display.advance(1, {"loss": "0.5"}, images=8)
        clock.now += 1
        display.step(2)
        (task,) = display._bar.progress.tasks
        assert task.completed == 2 and task.fields["facts"] == "loss 0.5  8.0 images/s"


def test_a_spinner_names_what_is_done_and_disappears(clock: Clock) -> None:
    display, stream = on_terminal(clock)
    with display.busy("importing torch"), display.busy("a part of it"):
        display.say("a line")
    text = stream.getvalue()
    assert "importing torch" in text and "a line\n" in text and "a part of it" not in text
    assert text.endswith("\x1b[2K")  # the line of the spinner is erased


@pytest.mark.parametrize(("enabled", "verbose"), [(True, True), (False, True), (True, False)])
def test_nothing_moves_in_a_file_on_other_processes_or_without_verbose(
    enabled: bool, verbose: bool, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display(enabled, verbose)
    with display.busy("importing torch"):
        pass
    with display.epoch("epoch 1/3", 10):
        for step in range(1, 11):
            clock.now += 1
            display.step(step)
            display.advance(step, {}, 8)
    assert capsys.readouterr().out == ""
    clock.now += 31
    display.advance(10, {}, 8)
    assert ("step 10/10" in capsys.readouterr().out) == (enabled and verbose)


CELL = """
from types import SimpleNamespace
from resnet_dist.runtime import bars, display as shown
from resnet_dist.runtime.display import Display
clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
bars.time = shown.time = clock
display = Display(enabled=True)
with display.busy("importing torch"):
    pass
with display.epoch("epoch 1/3", 4):
    for step in (1, 2):
        clock.now += 0.6
        display.step(step)
    print("before the end")
    raise KeyboardInterrupt
"""


def test_the_bar_in_a_notebook_needs_no_widgets(notebook_kernel: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    shown: list[str] = []

    class Client(NotebookClient):
        """It notes every text that the kernel shows or replaces."""

        def process_message(self, msg: dict, cell: object, cell_index: int) -> object:  # type: ignore[override, type-arg]
            if msg["msg_type"] in ("display_data", "update_display_data"):
                shown.append(msg["content"]["data"]["text/plain"])
            return super().process_message(msg, cell, cell_index)  # type: ignore[arg-type]

    Client(notebook, timeout=60, kernel_name=notebook_kernel, allow_errors=True).execute()
    assert shown[:3] == ["importing torch", "", "epoch 1/3"] and shown[-1] == ""
    assert [text.split("  ")[2] for text in shown[3:-1]] == ["1/4", "2/4"]
    assert shown[4].endswith("0:01 left")
