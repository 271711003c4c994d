"""Start a module in several connected processes that are forked from one in which torch is imported already.

With `accelerate launch`, the launcher and every process import torch: 15 s of CPU time for two processes. Tests of
what a launcher does, or of signals to it, use the real one.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.launch.helpers import free_port

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["resnet_dist.training.run", "resnet_dist.training.finish", "resnet_dist.report.plots"])


def run_module(module: str, arguments: list[str], variables: dict[str, str], said: str) -> None:
    """Run `python -m module arguments...` in this process, with its output in the file `said`."""
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= variables
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def exit_codes(
    processes: int, module: str, *arguments: str | Path, timeout: float = 240, **variables: str
) -> tuple[list[int | None], str]:
    """Run a module in connected processes, with the variables that torchrun sets.

    Returns the exit code of each process by rank (None for one that was ended after `timeout` seconds; the negative
    number of a signal), and all that they said. A single process has no launcher's variables.
    """
    common = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **variables}
    if processes > 1:
        world = str(processes)
        common |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "ACCELERATE_MIXED_PRECISION": "no"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.NamedTemporaryFile("r") as said:
        ranks = []
        for rank in map(str, range(processes)):
            own = {**common, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else common
            ranks.append(FORKS.Process(target=run_module, args=(module, [*map(str, arguments)], own, said.name)))
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        return codes, said.read()


def together(processes: int, *arguments: str | Path) -> str:
    """Run `resnet-dist` in connected processes, which must succeed; what they said."""
    codes, said = exit_codes(processes, "resnet_dist", *arguments)
    assert codes == [0] * processes, said[-9000:]
    return said


def launched(processes: int, out: Path, module: str, *arguments: str | Path) -> list[dict[str, Any]]:
    """Run a module in connected processes with the arguments OUT...; the result of every process, by rank.

    Each process ends with `finish(OUT, result)`.
    """
    out.mkdir(parents=True, exist_ok=True)
    codes, said = exit_codes(processes, module, out, *arguments)
    assert codes == [0] * processes, said[-9000:]
    return results_in(out, processes)


def results_in(out: Path, processes: int) -> list[dict[str, Any]]:
    """What the processes that were launched with OUT wrote there, by rank."""
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def finish(out: Path, rank: int, result: dict[str, Any]) -> None:
    """Write what this process found: plain numbers, strings, lists, dicts and tensors."""
    torch.save(result, out / f"{rank}.pt")
