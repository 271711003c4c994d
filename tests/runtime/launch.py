"""Start a test module in several processes with the real launcher, and read back what each process found."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def launched(
    processes: int, out: Path, module: str, *arguments: str | Path, timeout: int = 240
) -> list[dict[str, Any]]:
    """Run `python -m module OUT arguments...` under accelerate launch; the result of every process, by rank.

    Each process ends with `finish(OUT, result)`. One process is started without a launcher.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, str(out), *map(str, arguments)]
    if processes > 1:
        launch = "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
        command[1:2] = ["-m", *launch.split(), "--num_processes", str(processes), "--main_process_port", "0", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-9000:]
    return results_in(out, processes)


def results_in(out: Path, processes: int) -> list[dict[str, Any]]:
    """What the processes that were launched with OUT wrote there, by rank."""
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def finish(out: Path, rank: int, result: dict[str, Any]) -> None:
    """Write what this process found: plain numbers, strings, lists, dicts and tensors."""
    torch.save(result, out / f"{rank}.pt")
