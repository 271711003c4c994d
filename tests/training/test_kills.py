"""Saving that is killed, cut off or out of space never costs a state that was on the disk."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from resnet_dist.errors import ArtifactError, MachineError
from resnet_dist.training.state import read_newest_state, remove_unfinished
from tests.conftest import small_disk
from tests.training.saver import save

KILLS = 40


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that saves into the folder of the test (tests/training/saver.py)."""
    command = [sys.executable, "-m", "tests.training.saver", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def saved_until_killed(saver: subprocess.Popen[str], first: int, wait: Callable[[], object]) -> list[int]:
    """The numbers of the states that it saved, from `first` on, before it was killed after `wait` returned."""
    assert saver.stdin is not None and saver.stdout is not None
    saver.stdin.write(f"{first}\n")
    saver.stdin.flush()
    word, pid = saver.stdout.readline().split()
    assert word == "saving"
    wait()
    os.kill(int(pid), signal.SIGKILL)
    return [int(line.split()[1]) for line in iter(saver.stdout.readline, "ended\n")]


def number_of_newest(folder: Path) -> tuple[int, list[str]]:
    """The number of the newest state, once it is clear that all of it is of that state; and the warnings."""
    tensors, facts, warnings = read_newest_state(folder)
    number: int = facts["state"]["epochs_done"]
    assert torch.equal(tensors["model/a"], torch.full((5_000_000,), float(number)))
    return number, warnings


def test_killed_forty_times_while_saving(saver: subprocess.Popen[str], tmp_path: Path) -> None:
    """What was said to be saved is there, or the one after it; never a part of one.

    Half of the kills come at any moment, the others while or soon after files are written.
    """
    moments = random.Random(0)

    def while_it_writes() -> None:
        end_of_wait = time.monotonic() + 10
        while not any(tmp_path.glob(".tmp-*")):
            assert time.monotonic() < end_of_wait
        time.sleep(moments.uniform(0, 0.02))

    newest = saved_until_killed(saver, 0, lambda: time.sleep(1))[-1]
    struck = 0
    for kill in range(KILLS):
        wait = while_it_writes if kill % 2 else lambda: time.sleep(moments.uniform(0, 0.2))
        said = saved_until_killed(saver, newest + 1, wait)
        struck += any(tmp_path.glob(".tmp-*"))
        acknowledged = said[-1] if said else newest
        newest, warnings = number_of_newest(tmp_path)
        assert newest in (acknowledged, acknowledged + 1) and not warnings
        remove_unfinished(tmp_path)
        assert not list(tmp_path.glob(".tmp-*"))
    assert struck >= KILLS / 8, "else the kills came between two states"
    save(tmp_path, newest + 1)
    assert number_of_newest(tmp_path) == (newest + 1, [])
    assert len(list(tmp_path.iterdir())) == 2, "what a kill kept from being removed is removed by the next state"


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda state: flip(state / "state.safetensors"),
    "a cut tail": lambda state: os.truncate(state / "state.safetensors", 1000),
    "an empty file": lambda state: os.truncate(state / "state.safetensors", 0),
    "a flipped bit in the facts": lambda state: flip(state / "state.json"),
    "a flipped bit in the manifest": lambda state: flip(state / "manifest.json"),
    "no manifest": lambda state: (state / "manifest.json").unlink(),
    "no tensors": lambda state: (state / "state.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_skipped(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 0)
    save(tmp_path, 2)
    assert number_of_newest(tmp_path) == (2, [])
    newest = tmp_path / "step-000000001"
    DAMAGES[damage](newest)
    number, warnings = number_of_newest(tmp_path)
    assert number == 0
    assert len(warnings) == 1 and warnings[0].startswith(f"WARNING: {newest}: passed over, it does not verify (")
    DAMAGES[damage](tmp_path / "step-000000000")
    with pytest.raises(ArtifactError, match=r"no checkpoint to resume from; WARNING: .*; WARNING: "):
        read_newest_state(tmp_path)


def test_the_state_of_a_step_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    """Killed between the two renames, the one that was put aside is what there is; the next state clears it away."""
    save(tmp_path, 0)
    save(tmp_path, 2)
    (tmp_path / "step-000000001").rename(tmp_path / "step-000000001.replaced")
    assert number_of_newest(tmp_path) == (2, [])
    save(tmp_path, 3)
    assert number_of_newest(tmp_path) == (3, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000", "step-000000001"]
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000", "step-000000001"], "two are kept"


def assert_second_fails(folder: Path, reason: str) -> None:
    """The next state cannot be written for this reason, and the one that is there stays as it is."""
    with pytest.raises(MachineError, match=f"cannot be written \\({reason}\\); older ones are intact"):
        save(folder, 2)
    assert number_of_newest(folder) == (0, [])
    assert [path.name for path in folder.iterdir()] == ["step-000000000"]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    save(tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert_second_fails(tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path: Path) -> None:
    """A disk with room for one state and a half."""
    with small_disk(tmp_path / "disk", "30m"):
        save(tmp_path / "disk", 0)
        assert_second_fails(tmp_path / "disk", "No space left on device")
