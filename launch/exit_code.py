"""Run a launcher and return the exit code of the training that it started.

    python launch/exit_code.py RUN_FOLDER COMMAND...

`accelerate launch`, torchrun and srun make a 1 of every failure. What happened stands in RUN_FOLDER/run.json, if this
attempt wrote there: 75 when training was told to stop and has saved a checkpoint, so that the same command goes on from
it; else a code of resnet_dist/errors.py. Signals to stop go on to COMMAND: in a container it is this, the first
process, that gets them. Needs nothing but Python.
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
WAIT = 30.0  # seconds that the process which writes run.json, maybe on another machine, may end after our own


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns its exit code, or the one of the training that it launched."""
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
        code = told(file, before) or (code if code > 0 else 128 - code)
    return code


def told(file: Path, before: tuple[str, int]) -> int:
    """The exit code that this attempt wrote to run.json; 0 if none, as where it was killed or never got that far."""
    end = time.monotonic() + WAIT
    facts = changed(file, before)
    while facts.get("status") == "running" and time.monotonic() < end:
        time.sleep(0.2)
        facts = changed(file, before)
    if facts.get("status") == "preempted":
        return PREEMPTED
    return int(facts.get("exit_code") or 0) if facts.get("status") == "failed" else 0


def changed(file: Path, before: tuple[str, int]) -> dict[str, Any]:
    """What run.json says, if it was written since `before`: an old "preempted" must not speak for a new failure."""
    now = contents(file)
    facts: dict[str, Any] = json.loads(now[0]) if now[0] and now != before else {}
    return facts


def contents(file: Path) -> tuple[str, int]:
    """The file's text and its time of change; empty where there is none."""
    try:
        return file.read_text(encoding="utf-8"), file.stat().st_mtime_ns
    except OSError:
        return "", 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
