"""Run a launcher and return the exit code of the training that it started.

    python launch/exit_code.py RUN_FOLDER COMMAND...

`accelerate launch`, torchrun and srun return 1 for every failure. This program reads the reason from
RUN_FOLDER/run.json, if this attempt wrote it. It returns 75 if training was told to stop and saved a checkpoint, from
which the same command continues; otherwise a code of resnet_dist/errors.py. It passes signals to stop on to COMMAND,
because in a container the first process gets them. It needs only Python.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREEMPTED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WAIT = 30.0  # seconds to wait for the process that writes run.json, which may be on another machine


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns the exit code of the training that it launched, or its own."""
    if len(arguments) < 2:
        print("usage: exit_code.py RUN_FOLDER COMMAND...", file=sys.stderr)
        return 2
    file = Path(arguments[0]) / "run.json"
    before = contents(file)
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    for stop in STOP_SIGNALS:
        signal.signal(stop, pass_on)
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends Ctrl-C to the command as well
    child = subprocess.Popen(arguments[1:])
    for number in early:
        child.send_signal(number)
    code = child.wait()
    if code != 0:
        code = recorded_code(file, before) or (code if code > 0 else 128 - code)
    return code


def recorded_code(file: Path, before: tuple[str, int]) -> int:
    """The exit code that this attempt wrote to run.json; 0 if it wrote none (it was killed or failed too early)."""
    end = time.monotonic() + WAIT
    facts = changed(file, before)
    while facts.get("status") == "running" and time.monotonic() < end:
        time.sleep(0.2)
        facts = changed(file, before)
    if facts.get("status") == "preempted":
        return PREEMPTED
    return int(facts.get("exit_code") or 0) if facts.get("status") == "failed" else 0


def changed(file: Path, before: tuple[str, int]) -> dict[str, Any]:
    """The content of run.json if it has changed since `before`, because an old status is not about this attempt."""
    now = contents(file)
    facts: dict[str, Any] = json.loads(now[0]) if now[0] and now != before else {}
    return facts


def contents(file: Path) -> tuple[str, int]:
    """The text and the modification time of a file; ("", 0) if there is none."""
    try:
        return file.read_text(encoding="utf-8"), file.stat().st_mtime_ns
    except OSError:
        return "", 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
