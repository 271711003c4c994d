"""`resnet-dist doctor`: what this machine has, what `accelerate launch` starts, and a self-test."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show versions, GPUs, cores, disk, port and what `accelerate launch` starts; then run a self-test."""

    self_test: bool = True
    """Train and evaluate on a few tiny images with one process and with two, and compare the results."""

    def problems(self) -> Iterator[str]:
        """None: no value of these options is wrong."""
        return iter(())


def main(cfg: Config) -> int:
    """Print what this machine has, and test it. Returns the exit code. Raises MachineError if the self-test fails."""
    from resnet_dist.runtime.doctor import facts
    from resnet_dist.runtime.self_test import self_test

    for name, value in facts():
        print(f"{name:<18} {value}")
    if cfg.self_test:
        print(f"{'self-test':<18} training with one process and with two, on the CPU ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="resnet-dist-doctor-") as folder:
            for line in self_test(Path(folder)):
                print(f"{'':<18} {line}", flush=True)
    return 0
