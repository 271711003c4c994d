"""A launcher that is killed without warning, at whatever moment, leaves nobody behind and costs no bit of the run."""

import random
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch.helpers import Command, end
from tests.train.test_resume import EVERYTHING, LAUNCHED, facts, outcome, uninterrupted  # noqa: F401 - a fixture

KILLS = 4  # forty by hand, before a release
SECONDS_TO_BE_GONE = 15.0
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


def kill_and_resume(arguments: list[str], run: Path, moments: random.Random, kills: int, duration: float) -> list[str]:
    """Start the run, kill the launcher, and so on; let it end at last. Returns a line about every kill.

    Every second kill comes at any moment from the first millisecond on, the others after the processes were started.
    """
    lines = []
    while len(lines) < kills:
        mark = uuid.uuid4().hex
        launcher = start_marked(arguments, mark)
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
                break  # the run is complete
            launcher.send_signal(signal.SIGKILL)
            launcher.wait()
            gone = seconds_until_gone(mark)
        finally:
            end(launcher)
        status = facts(run)["status"] if (run / "run.json").exists() else "not begun"
        lines.append(
            f"{wait:5.1f} s after {'the ranks' if after_ranks else 'the launcher'}: gone {gone:.1f} s, {status}"
        )
    launcher = start_marked(arguments, "whole")
    said = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, said
    return lines


@pytest.mark.matrix
def test_a_killed_launcher_leaves_nobody(
    folder: Path,
    tmp_path: Path,
    uninterrupted: Callable[[int], Path],  # noqa: F811
) -> None:
    began = time.monotonic()
    whole = uninterrupted(2)
    duration = max(5.0, min(60.0, time.monotonic() - began))
    run = tmp_path / "run"
    arguments = ["train", str(folder), *EVERYTHING, "--workers", "1", "-o", str(run), "--resume", "auto"]
    for line in kill_and_resume(arguments, run, random.Random(0), KILLS, duration):
        print(line)
    assert outcome(run) == outcome(whole)
