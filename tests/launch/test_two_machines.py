"""Two machines on one: each command of the README in a network namespace of its own, with a cable between them."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch.helpers import (
    assert_every_epoch_once,
    assert_trained,
    commands,
    finish,
    kill_training,
    replaced,
    wait_for_epochs,
)

PARAMETERS_OF_RESNET18 = 11_000_000


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two namespaces that see each other as 10.0.0.1 and 10.0.0.2 through their eth0, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (Debian's iproute2)")
    names = (f"machine0-{os.getpid()}", f"machine1-{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.0.0.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    except OSError as error:
        pytest.skip(f"network namespaces are not allowed here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(machines: tuple[str, str], run: Path, photos: Path, *options: str) -> list[subprocess.Popen[str]]:
    """The README's two commands, as they stand but for one process per machine and a training of seconds."""
    stand_ins = {"photos": str(photos), "runs/photos": str(run)}
    nodes = [replaced(command, stand_ins, ["--num_processes", "2"]) for command in commands("Two nodes by hand")]
    return [
        replace(node, arguments=[*node.arguments, *options]).start("ip", "netns", "exec", machine)
        for node, machine in zip(nodes, machines, strict=True)
    ]


@pytest.mark.matrix
def test_two_machines_train_one_model(machines: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    """One run, whose gradients went over the cable."""
    said = finish(*start(machines, tmp_path / "run", photos))
    assert_trained(tmp_path / "run", "\n".join(said), processes=2)
    for machine in machines:
        (link,) = json.loads(ip("-n", machine, "-json", "-stats", "link", "show", "eth0"))
        assert link["stats64"]["rx"]["bytes"] > 2 * 4 * PARAMETERS_OF_RESNET18, "less than two steps' gradients came"


@pytest.mark.matrix
def test_machine_recovers_after_losing_its_process(machines: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    """Both launchers start anew, and the run goes on from its last checkpoint: every epoch once, in order."""
    processes = start(machines, tmp_path / "run", photos, "--epochs", "12")
    try:
        wait_for_epochs(tmp_path / "run", 3)
        kill_training(processes[1])
    finally:
        said = finish(*processes)
    assert any("resuming" in text for text in said)
    assert_every_epoch_once(tmp_path / "run", 12)
