"""What the tests of launch/ share: where it is, its commands with stand-ins, and processes that start and end."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
# The precision stays the launcher's, so that the tests see whether its files are obeyed.
TRAIN = [*TINY[: TINY.index("--mixed-precision")], "--no-report", "--epochs", "1", "--batch-size", "4"]


def environment(**extra: str) -> dict[str, str]:
    """This environment with the commands of this interpreter first in PATH, and no GPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **extra}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def write_program(file: Path, script: str) -> None:
    """An executable of these shell lines."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


@dataclass(frozen=True)
class Command:
    """A command with its environment."""

    arguments: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def start(self, *before: str) -> subprocess.Popen[str]:
        """Start it in the repository's root, its output in one text."""
        return subprocess.Popen(
            [*before, *self.arguments],
            cwd=ROOT,
            env=environment(**self.variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def commands(section: str) -> list[Command]:
    """The commands that launch/README.md gives under a heading."""
    text = (LAUNCH / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [read(line) for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in lines(block)]


def lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").strip().splitlines()


def read(line: str) -> Command:
    """A line of a shell: NAME=value ... command."""
    words = shlex.split(line)
    first = next(number for number, word in enumerate(words) if not re.match(r"\w+=", word))
    return Command(words[first:], dict(word.split("=", 1) for word in words[:first]))


def replaced(command: Command, stand_ins: Mapping[str, str], launcher: Sequence[str] = ()) -> Command:
    """The command with other words and values for some, more options for its launcher, and the tiny training."""
    words = [stand_ins.get(word, word) for word in command.arguments]
    if launcher:
        words[words.index("-m") : words.index("-m")] = launcher
    variables = {name: stand_ins.get(value, value) for name, value in command.variables.items()}
    return Command([*words, *TRAIN], variables)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Wait for all of them and return what they said; each must have returned 0."""
    try:
        said = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            end(process)
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def wait_for_epochs(run: Path, epochs: int) -> None:
    """Until so many epochs are in the run's table."""
    table, end_of_wait = run / "metrics.csv", time.monotonic() + 100
    while not (table.exists() and len(table.read_text().splitlines()) > epochs):
        assert time.monotonic() < end_of_wait, f"{epochs} epochs were never done"
        time.sleep(0.1)


def kill_training(launcher: subprocess.Popen[str]) -> None:
    """Kill the first process that it started, without warning."""
    psutil.Process(launcher.pid).children()[0].kill()


def assert_every_epoch_once(run: Path, epochs: int) -> None:
    numbers = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()]
    assert numbers == ["epoch", *map(str, range(1, epochs + 1))]


def end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of it, with its descendants: a killed launcher leaves the training that it started."""
    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        process.communicate()
    if process.stdout is not None:  # open still if it was killed and nobody asked what it said
        process.stdout.close()


def assert_trained(run: Path, said: str, processes: int) -> None:
    """The run is complete, evaluated every image once, and so many processes took part."""
    assert re.search(rf"^{processes} process(es)? on ", said, re.MULTILINE), said
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    lines_of_predictions = (run / "eval/val/predictions.csv").read_text().splitlines()
    assert len(lines_of_predictions) == 1 + 3, "a header, and one image per class"
