"""Two machines on one: each command of the README in a network namespace of its own, with a cable between them."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.helpers import assert_trained, commands, finish, replaced

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


def test_two_machines_train_one_model(machines: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    """The README's two commands, as they stand: one process per machine, gradients over the cable, one run."""
    stand_ins = {"photos": str(photos), "runs/photos": str(tmp_path / "run")}
    nodes = [replaced(command, stand_ins, ["--num_processes", "2"]) for command in commands("Two nodes by hand")]
    said = finish(*(node.start("ip", "netns", "exec", machine) for node, machine in zip(nodes, machines, strict=True)))
    assert_trained(tmp_path / "run", "\n".join(said), processes=2)
    for machine in machines:
        (link,) = json.loads(ip("-n", machine, "-json", "-stats", "link", "show", "eth0"))
        assert link["stats64"]["rx"]["bytes"] > 2 * 4 * PARAMETERS_OF_RESNET18, "less than two steps' gradients came"
