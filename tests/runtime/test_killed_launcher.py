"""A launcher or a process that is killed, at whatever moment, leaves nobody behind and costs no bit of the run."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch.helpers import Command, end, free_port
from tests.training.test_resume import EVERYTHING, LAUNCHED, facts, outcome, uninterrupted  # noqa: F401 - a fixture

KILLS = 2  # one of each kind; forty by hand, before a release
SECONDS_TO_BE_GONE = 15.0
SECONDS_TO_START = 12.0  # about, of the launcher and of its processes, until they train
MARK = "RESNET_DIST_TEST_RUN"  # in the environment of everything that one launcher starts


def started_with(mark: str) -> list[psutil.Process]:
    """All living processes that a launcher with this mark in its environment started, and itself."""
    living = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        living += [process] if is_ours else []
    return living


def seconds_until_gone(mark: str) -> float:
    """How long it takes until none of them is left; those that stay are ended, and it fails."""
    began = time.monotonic()
    while left := started_with(mark):
        if time.monotonic() - began > SECONDS_TO_BE_GONE:
            commands = [" ".join(process.cmdline()) for process in left]
            for process in left:
                process.kill()
            pytest.fail(f"still there after {SECONDS_TO_BE_GONE} s: {commands}")
        time.sleep(0.1)
    return time.monotonic() - began


def start_marked(arguments: list[str], mark: str) -> subprocess.Popen[str]:
    return Command([*LAUNCHED, "resnet_dist", *arguments], {MARK: mark}).start()


def kill_and_resume(
    arguments: list[str], place: Path, moments: random.Random, kills: int, duration: float
) -> tuple[list[str], list[Path]]:
    """Start a run in `place`, kill its launcher, start it again, and so on; if a run ends first, another one follows.

    Every second kill comes at any moment from the first millisecond on, the others after the processes were started.
    Returns a line about every kill, and the runs, all of which are complete.
    """
    lines: list[str] = []
    runs = [place / "run-0"]
    while len(lines) < kills:
        mark = uuid.uuid4().hex
        launcher = start_marked([*arguments, "-o", str(runs[-1])], mark)
        after_ranks = len(lines) % 2 == 1
        try:
            while after_ranks and launcher.poll() is None and not psutil.Process(launcher.pid).children():
                time.sleep(0.005)
            wait = moments.uniform(0, duration * (0.7 if after_ranks else 1))
            began = time.monotonic()
            while launcher.poll() is None and time.monotonic() - began < wait:
                time.sleep(0.002)
            if launcher.poll() is not None:
                assert launcher.returncode == 0, launcher.communicate()[0]
                runs.append(place / f"run-{len(runs)}")
                continue
            launcher.send_signal(signal.SIGKILL)
            launcher.wait()
            gone = seconds_until_gone(mark)
        finally:
            end(launcher)
        status = facts(runs[-1])["status"] if (runs[-1] / "run.json").exists() else "not begun"
        lines.append(
            f"{wait:5.1f} s after {'the ranks' if after_ranks else 'the launcher'}: gone {gone:.1f} s, {status}"
        )
    launcher = start_marked([*arguments, "-o", str(runs[-1])], "whole")
    said = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, said
    return lines, runs


@pytest.mark.matrix
def test_a_killed_launcher_leaves_no_process(
    folder: Path,
    tmp_path: Path,
    uninterrupted: Callable[[int], Path],  # noqa: F811
) -> None:
    whole = uninterrupted(2)
    duration = SECONDS_TO_START + float(whole.with_name("seconds").read_text())
    arguments = ["train", str(folder), *EVERYTHING, "--workers", "1", "--resume", "auto"]
    lines, runs = kill_and_resume(arguments, tmp_path, random.Random(0), KILLS, duration)
    print("\n".join([*lines, f"{len(lines)} kills, {len(runs)} runs"]))
    assert len(lines) == KILLS
    for run in runs:
        assert outcome(run) == outcome(whole)


@pytest.mark.matrix
@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_a_process_that_is_killed_while_it_starts(seconds: float, folder: Path, tmp_path: Path) -> None:
    """The launcher ends the other one with a signal, which must not wait for a loop that never begins."""
    mark = uuid.uuid4().hex
    launcher = start_marked(["train", str(folder), *EVERYTHING, "-o", str(tmp_path / "run")], mark)
    try:
        while len(ranks := psutil.Process(launcher.pid).children()) < 2:
            time.sleep(0.01)
        time.sleep(seconds)
        ranks[1].kill()
        began = time.monotonic()
        seconds_until_gone(mark)
        assert time.monotonic() - began < SECONDS_TO_BE_GONE
    finally:
        end(launcher)


PEER = """
import os, signal, sys, time
import torch
from resnet_dist.runtime.accelerate import wait_until
from resnet_dist.runtime.signals import StopRequests
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
stop = StopRequests()
stop.connect(10)
for _ in range(3):
    look = stop.pulse()  # both are there: nothing is raised, and nobody waits
    moments = iter([False] * 20 + [True])
    wait_until(lambda: next(moments), look)
    stop.check()
torch.distributed.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
began = time.monotonic()
try:
    wait_until(lambda: time.monotonic() - began > 60, stop.pulse())
    print("waited in vain")
except RuntimeError as error:
    print("noticed", time.monotonic() - began < 10)
"""


@pytest.mark.matrix
def test_the_end_of_another_process_is_noticed_while_a_device_works() -> None:
    """A device that waits for another process never finishes; here a function simulates it."""
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PEER], env=os.environ | both | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert said[0] == "noticed True\n" and processes[1].returncode == -signal.SIGKILL


# Without torch: a main thread that does not run Python, as in a library that waits for other processes.

STUCK = """
import ctypes, os, signal, sys, threading
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime import signals as stop
launcher._parent_is_python = lambda: True
stop.end_with_launcher()
stop.SECONDS_TO_LEAVE = stop.SECONDS_TO_SAVE = 0.5
with stop.stop_requests() as requests:
    requests.on_exit = lambda code, reason: print(code, reason, flush=True)
    requests.is_read = "training" in sys.argv
    if "told" in sys.argv:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    print("waiting", flush=True)
    mutex = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever, and signals do not interrupt it
"""


def test_a_process_that_cannot_react_is_ended() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK, "told"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "waiting\n143 stopped by SIGTERM before the first step\n", done.stderr


PARENT = """
import os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ctypes deadlocks differently")
@pytest.mark.parametrize("state", ["training", "starting"])
def test_a_process_that_cannot_react_ends_with_its_launcher(state: str) -> None:
    command = [sys.executable, "-c", PARENT, sys.executable, "-c", STUCK, state]
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid, word = parent.stdout.readline().split()
        assert word == "waiting"
        child = psutil.Process(int(pid))
        time.sleep(0.2)
        assert child.is_running()
        parent.kill()
    assert psutil.wait_procs([child], timeout=10)[1] == []


ORPHAN = """
import os, sys, time
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime import signals as stop
while os.getppid() == int(sys.argv[2]):
    time.sleep(0.01)
if launcher._parent_is_python():
    print("adopted by Python", flush=True)
else:
    stop.end_with_launcher()
    print("it went on", flush=True)
"""


def test_a_process_whose_launcher_had_ended_before_it_could_ask() -> None:
    """As when it is killed while Python starts: the first thing is to see that it is gone."""
    start = "import os, subprocess, sys; subprocess.Popen([*sys.argv[1:], str(os.getpid())], start_new_session=True)"
    command = [sys.executable, "-c", start, sys.executable, "-c", ORPHAN, "orphan"]
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment).stdout
    if said == "adopted by Python\n":
        pytest.skip("the first process of this machine is in Python, as a launcher is")
    assert said == ""
