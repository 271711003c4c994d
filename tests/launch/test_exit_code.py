"""launch/exit_code.py: a launcher says 1 for everything; what happened stands in run.json."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.launch.helpers import LAUNCH, TRAIN, Command, assert_every_epoch_once, end, finish, wait_for_epochs


@pytest.fixture
def exit_code() -> ModuleType:
    """The file as a module, which waits for a moment only."""
    spec = importlib.util.spec_from_file_location("exit_code", LAUNCH / "exit_code.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__dict__["WAIT"] = 1.0
    return module


def write(run: Path, status: str, code: int | None = None) -> str:
    """A shell command that writes run.json as a run does."""
    facts = json.dumps({"status": status, "exit_code": code})
    return f"echo '{facts}' > '{run}/new'; mv '{run}/new' '{run}/run.json'"


def wrapped(run: Path, script: str) -> list[str]:
    return [sys.executable, str(LAUNCH / "exit_code.py"), str(run), "sh", "-c", script]


@pytest.mark.parametrize(
    ("status", "written", "launcher", "expected"),
    [
        ("done", 0, 0, 0),
        ("preempted", 75, 1, 75),
        ("failed", 3, 1, 3),
        ("failed", None, 1, 1),  # without a code of its own
        ("done", 0, 1, 1),  # the launcher failed after the run
    ],
)
def test_returns_the_code_of_the_run(
    status: str, written: int | None, launcher: int, expected: int, tmp_path: Path
) -> None:
    script = f"{write(tmp_path, status, written)}; exit {launcher}"
    assert subprocess.run(wrapped(tmp_path, script)).returncode == expected


@pytest.mark.parametrize(("script", "expected"), [("exit 1", 1), ("exit 0", 0), ("kill -9 $$", 128 + 9)])
def test_exit_code_of_an_earlier_attempt_does_not_count(script: str, expected: int, tmp_path: Path) -> None:
    """Else a job that no longer starts would be repeated for ever."""
    subprocess.run(["sh", "-c", write(tmp_path, "preempted", 75)], check=True)
    assert subprocess.run(wrapped(tmp_path, script)).returncode == expected


def test_same_exit_code_written_again_counts(tmp_path: Path) -> None:
    subprocess.run(["sh", "-c", write(tmp_path, "preempted", 75)], check=True)
    assert subprocess.run(wrapped(tmp_path, f"{write(tmp_path, 'preempted', 75)}; exit 1")).returncode == 75


def test_killed_run_has_no_recorded_code(exit_code: ModuleType, tmp_path: Path) -> None:
    """Its status stays "running"; then the launcher's code stands."""
    subprocess.run(["sh", "-c", write(tmp_path, "running")], check=True)
    assert exit_code.recorded_code(tmp_path / "run.json", ("", 0)) == 0


def test_waits_for_the_process_that_writes(tmp_path: Path) -> None:
    """On another machine it may still be saving when our launcher has ended."""
    script = f"{write(tmp_path, 'running')}; (sleep 1; {write(tmp_path, 'preempted', 75)}) & exit 1"
    assert subprocess.run(wrapped(tmp_path, script)).returncode == 75


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP], ids=lambda s: s.name
)
def test_passes_signals_on(number: signal.Signals, tmp_path: Path) -> None:
    save = f"{write(tmp_path, 'preempted', 75)}; exit 1"
    script = f'trap "$0" {number.name.removeprefix("SIG")}; echo ready; while :; do sleep 0.1; done'
    command = [*wrapped(tmp_path, script), save]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == 75


@pytest.mark.matrix
def test_stopped_training_continues(photos: Path, tmp_path: Path) -> None:
    """SIGTERM to the first process of a container: 75; the same command again finishes, every epoch once, in order."""
    run = tmp_path / "run"
    launcher = ["accelerate", "launch", "--config_file", str(LAUNCH / "cpu.yaml"), "-m", "resnet_dist", "train"]
    training = [str(photos), "-o", str(run), "--resume", "auto", *TRAIN, "--epochs", "15"]
    command = Command([sys.executable, str(LAUNCH / "exit_code.py"), str(run), *launcher, *training])
    process = command.start()
    try:
        wait_for_epochs(run, 3)
        process.terminate()
        said = process.communicate(timeout=100)[0]
    finally:
        end(process)
    assert process.returncode == 75, said
    finish(command.start())
    assert_every_epoch_once(run, 15)


def test_without_a_command(exit_code: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code.main(["runs/photos"]) == 2
    assert "usage" in capsys.readouterr().err
