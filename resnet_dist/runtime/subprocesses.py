"""Run this program in processes of its own: in one without a launcher, or in several that torchrun starts."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from resnet_dist.errors import MachineError, UsageError
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.wording import counted


def run_program(
    what: str, arguments: Sequence[str], processes: int | None, variables: Mapping[str, str], timeout: int
) -> None:
    """Run `resnet-dist` with these arguments, and wait for it. Nothing that it prints is shown.

    `processes` are started by torchrun; None starts one without a launcher. `variables` are added to the environment.
    Raises MachineError, which begins with `what`, if the program fails or takes longer than `timeout` seconds;
    UsageError if this process is itself one of several.
    """
    if launcher.is_distributed():
        raise UsageError(f"{what} starts its own processes: start it without accelerate launch or torchrun")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes else ()), "-m", "resnet_dist", *arguments]
    environment, name = {**os.environ, **variables}, f"{what} with {counted(processes or 1, 'process')}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise MachineError(f"{name} did not end within {counted(timeout // 60, 'minute')}") from None
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {done.returncode}"]
        raise MachineError(f"{name} failed: {errors[0]}")
