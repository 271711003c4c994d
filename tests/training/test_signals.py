"""Told to stop or killed, by whatever signal, whoever gets it: what ran is saved, run.json says so, nobody is left."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM, SIGUSR1, SIGUSR2

import psutil
import pytest

import resnet_dist.training.finish as finish
import resnet_dist.training.plan as plan
from resnet_dist.cli.main import main
from resnet_dist.evaluation.metrics import Measured
from resnet_dist.runtime import signals as stop
from resnet_dist.runtime.signals import StopRequested, stop_requests
from resnet_dist.training.job import Job
from resnet_dist.training.state import State, read_newest_state
from tests.conftest import TINY
from tests.launch.helpers import Command, end, wait_for_epochs
from tests.training.interrupted import interrupt, interrupted
from tests.training.test_resume import LAUNCHED, facts, launched

# No checkpoint but the one that a signal makes; an end that no test waits for.
ENDLESS = [*TINY, "--epochs", "9999", "--global-batch-size", "8", "--log-every", "1", "--save-every", "999999steps"]


@contextmanager
def training(folder: Path, run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Two processes in the middle of training, as launch/ starts them: their launcher, and all processes, it first."""
    arguments = [*LAUNCHED, "resnet_dist", "train", str(folder), *ENDLESS, *options, "-o", str(run)]
    launcher = Command(arguments, {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15"}).start()
    try:
        wait_for_epochs(run, 2)  # a checkpoint, if asked for, comes after the epoch's line
        first = psutil.Process(launcher.pid)
        family = [first, *first.children(recursive=True)]
        try:
            yield launcher, family
        finally:
            for member in family:
                if is_alive(member):
                    member.kill()
    finally:
        end(launcher)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_nobody_left(launcher: subprocess.Popen[str], family: list[psutil.Process]) -> str:
    """Before long (on a busy machine) the launcher and everything that it started is gone; returns what they said."""
    said = launcher.communicate(timeout=180)[0]
    end_of_wait = time.monotonic() + 20
    while (left := [member for member in family if is_alive(member)]) and time.monotonic() < end_of_wait:
        time.sleep(0.1)
    assert not left, said
    return said


def targets(family: list[psutil.Process], name: str) -> list[psutil.Process]:
    """The launcher, the first or second process that trains, one of its loader processes, or everybody."""
    ranks = family[0].children()
    one = {"launcher": family[0], "main": ranks[0], "rank": ranks[1]}
    if name == "loader":
        return ranks[1].children()[:1]
    return family if name == "all" else [one[name]]


# Who hears of it does not depend on which of the four signals it is: one test sends all of them to one process.
CELLS = [
    ("all", SIGTERM, 2),
    ("launcher", SIGTERM, 0),
    ("launcher", SIGINT, 2),
    ("rank", SIGUSR1, 0),
    ("rank", SIGINT, 2),
]
CELLS.append(("launcher", SIGKILL, 2))
IN_EVERY_SUITE = [("all", SIGTERM, 2)]


def name_of(value: object) -> str:
    return value.name if isinstance(value, signal.Signals) else str(value)


@pytest.mark.parametrize(
    ("target", "number", "workers"),
    [pytest.param(*cell, marks=[] if cell in IN_EVERY_SUITE else pytest.mark.matrix) for cell in CELLS],
    ids=name_of,
)
def test_all_stop_after_the_same_step_and_save(
    target: str, number: signal.Signals, workers: int, folder: Path, tmp_path: Path
) -> None:
    """Saving makes sure that all processes hold the same parameters: they stand after the same step."""
    run = tmp_path / "run"
    with training(folder, run, "--workers", str(workers)) as (launcher, family):
        assert len(family) >= 3 + 2 * workers
        for process in targets(family, target):
            process.send_signal(number)
        said = assert_nobody_left(launcher, family)
    assert (facts(run)["status"], facts(run)["exit_code"]) == ("preempted", 75), said
    _, saved, warnings = read_newest_state(run / "checkpoints")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, saved["state"]["steps_done"] + 1)) and not warnings
    assert saved["processes"] == 2
    assert launcher.returncode != 0


@pytest.mark.matrix
@pytest.mark.parametrize("target", ["main", "rank", "loader"])
def test_killed_process_ends_the_run(target: str, folder: Path, tmp_path: Path) -> None:
    """Without warning: nothing can be saved; the others say so in a line, leave, and the checkpoint before it stays."""
    run = tmp_path / "run"
    with training(folder, run, "--workers", "2", "--save-every", "1epochs") as (launcher, family):
        for process in targets(family, target):
            process.kill()
        said = assert_nobody_left(launcher, family)
    assert (facts(run)["status"], facts(run)["exit_code"]) == ("failed", 4), said
    assert ("a loader process ended" if target == "loader" else "another process of the run ended") in said
    assert read_newest_state(run / "checkpoints")[2] == []


@pytest.mark.matrix
def test_process_that_hangs_is_given_up(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(folder, run, "--dist-timeout", "0.1") as (launcher, family):
        for process in targets(family, "rank"):
            process.send_signal(SIGSTOP)
        said = assert_nobody_left(launcher, family)
    assert (facts(run)["status"], facts(run)["exit_code"]) == ("failed", 4), said
    lines = [line for line in said.splitlines() if line.startswith("resnet-dist train: error: ")]
    assert len(lines) == 1 and "another process of the run ended or hangs" in lines[0]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        ("out of memory", 4, "out of memory with 4 images per process; try --batch-size 2 --grad-accum 2"),
        ("nan", 5, ""),
    ],
)
def test_fault_of_one_process_is_a_decision_of_all(
    fault: str, code: int, reason: str, folder: Path, tmp_path: Path
) -> None:
    """A NaN on the second process is known to both at the same poll, and reaches no parameter."""
    run = tmp_path / "run"
    arguments = ["mid-epoch", fault, 1, "train", folder, *ENDLESS, "--save-every", "2steps", "-o", run]
    assert launched(2, *arguments, module="tests.training.interrupted") == [code, code]
    assert (facts(run)["status"], facts(run)["exit_code"]) == ("failed", code)
    tensors, saved, _ = read_newest_state(run / "checkpoints")
    assert saved["state"]["steps_done"] == 4
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    said = facts(run)["reason"]
    assert said.startswith("the loss became infinite or NaN in the steps before step 6") if code == 5 else said
    assert reason in said or "another process of the run ended" in said


# One process


def stop_here() -> None:
    os.kill(os.getpid(), SIGTERM)


def test_signal_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to save: it ends at once, as run.json says; a run that was resumed keeps its checkpoint."""
    run = tmp_path / "it's a run"
    arguments = ["train", str(folder), *ENDLESS, "--epochs", "1", "--save-every", "1steps", "-o", str(run)]
    with monkeypatch.context() as patch:
        interrupt("start", stop_here, patch.setattr)
        assert main(arguments) == 128 + SIGTERM
    said = capsys.readouterr().err
    assert said.startswith("resnet-dist train: stopped by SIGTERM before the first step; start again with `")
    assert shlex.split(said.split("`")[1]) == ["resnet-dist", *arguments, "--resume", "auto"]
    known = facts(run)
    assert (known["status"], known["exit_code"], known["reason"]) == (
        "failed",
        128 + SIGTERM,
        "stopped by SIGTERM before the first step",
    )
    assert main([*arguments, "--resume", "auto"]) == 0
    with monkeypatch.context() as patch:
        interrupt("start", stop_here, patch.setattr)
        assert main([*arguments, "--epochs", "2", "--resume", "auto"]) == 75
    command = shlex.split(capsys.readouterr().err.split("`")[1])
    assert command == ["resnet-dist", "train", "--resume", str(run)]
    assert (facts(run)["status"], facts(run)["exit_code"]) == ("preempted", 75)
    assert read_newest_state(run / "checkpoints")[1]["state"]["steps_done"] == 3
    assert main([*command[1:], "--epochs", "2"]) == 0
    assert facts(run)["status"] == "done"


def test_signal_while_the_best_checkpoint_is_evaluated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the last epoch: only that evaluation is done again, and a third time asked for, nothing.

    It is evaluated as after a resumed run, or one in bf16, whose validation did not keep exact records.
    """
    run, whole = tmp_path / "run", finish.finish

    def without_records(job: Job, state: State) -> dict[str, Measured]:
        state.best_records = None
        return whole(job, state)

    arguments = ["train", str(folder), *TINY, "--epochs", "1", "--batch-size", "8", "-o", str(run), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(finish, "finish", without_records)
        patch.setattr(finish, "load_checkpoint", interrupted(finish.load_checkpoint, 1, stop_here))
        assert main(arguments) == 75
    assert facts(run)["status"] == "preempted" and not (run / "eval").exists()
    metrics = (run / "metrics.csv").read_text()
    assert main(arguments) == 0
    assert facts(run)["status"] == "done" and (run / "eval/val/predictions.csv").exists()
    assert (run / "metrics.csv").read_text() == metrics
    capsys.readouterr()
    assert main(arguments) == 0
    assert "this run is complete" in capsys.readouterr().out


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGUSR1, SIGUSR2], ids=name_of)
def test_every_signal_is_a_request_to_stop(number: signal.Signals) -> None:
    with stop_requests() as requests:
        requests.check()  # from now on a loop reads them
        os.kill(os.getpid(), number)
        assert requests.signal == number
        with pytest.raises(StopRequested):
            requests.check()


def test_a_launched_process_that_trains_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `compare` does: the loss of its launcher is one signal to the second training, and nothing to the first."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(stop, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(stop.Watcher, "kept", None, raising=False)
    monkeypatch.setattr("resnet_dist.runtime.environment.has_launcher", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    try:
        with stop_requests() as first:
            first.on_exit = lambda *_: None
            first.check()
        assert first.on_exit is None
        with stop_requests() as second:
            second.check()
            assert len(watchers()) == 1
            monkeypatch.setattr(os, "getppid", lambda: 1)
            time.sleep(1.5)
            assert (first.signal, second.signal, exits) == (None, SIGTERM, [])
        with pytest.raises(stop.Stopped), stop_requests():
            raise AssertionError("what came meanwhile is forgotten")
    finally:
        for watcher in reversed(watchers()):
            watcher.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def watchers() -> list[stop.Watcher]:
    return [thread for thread in threading.enumerate() if isinstance(thread, stop.Watcher)]


def test_signal_in_a_dry_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that it would replace may be training in another process: its run.json stays as it is."""
    run = tmp_path / "run"
    run.mkdir()
    images = {"train": 24, "val": 6, "test": 0}
    facts = {"status": "running", "epochs": 1, "data_root": str(folder), "images": images}
    (run / "run.json").write_text(said := json.dumps(facts))
    monkeypatch.setattr(plan, "make_plan", interrupted(plan.make_plan, 1, stop_here))
    arguments = ["train", str(folder), *TINY, "--epochs", "1", "-o", str(run), "--overwrite", "--dry-run"]
    assert main(arguments) == 128 + SIGTERM
    assert (run / "run.json").read_text() == said


SECOND_SIGNAL = """
import os, signal, time
from resnet_dist.runtime.signals import stop_requests
with stop_requests() as stop:
    stop.last_words = "how to continue"
    stop.check()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.signal, flush=True)
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_second_signal_exits_at_once() -> None:
    """One that comes along with the first, as from a launcher to the whole group, does not."""
    done = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + SIGINT, f"{int(SIGTERM)}\n")
    assert done.stderr == "how to continue"


AS_A_LIBRARY = "import gc, sys; gc.disable(); from resnet_dist.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.matrix
def test_python_ends_after_a_run_with_loader_processes(folder: Path, tmp_path: Path) -> None:
    """They ignore the signal with which Python would end them, and it waits for them, unless the run has ended them."""
    arguments = ["train", folder, *TINY, "--workers", "2", "--epochs", "1", "--batch-size", "8", "-o", tmp_path / "run"]
    subprocess.run([sys.executable, "-c", AS_A_LIBRARY, *map(str, arguments)], check=True, timeout=120)


def test_signal_handlers_are_restored(folder: Path, tmp_path: Path) -> None:
    def mine(*_: object) -> None:
        raise AssertionError

    before = signal.signal(SIGUSR1, mine)
    try:
        assert main(["train", str(folder), *ENDLESS, "--dry-run", "-o", str(tmp_path / "run")]) == 0
        assert signal.getsignal(SIGUSR1) is mine
    finally:
        signal.signal(SIGUSR1, before)


def test_outside_of_the_main_thread_no_handler_is_installed() -> None:
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    seen = []

    def work() -> None:
        with stop_requests() as requests:
            requests.check()
            seen.append({number: signal.getsignal(number) for number in stop.SIGNALS})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before] and watchers() == []
