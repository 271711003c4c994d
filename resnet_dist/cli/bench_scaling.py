"""`resnet-dist bench scaling`: how training speeds up with processes on this machine."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_dist.cli.bench import cache_problems, train_config
from resnet_dist.config.fields import out_of_range
from resnet_dist.config.layers import options_of
from resnet_dist.config.schema import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PreprocessConfig,
    SystemConfig,
)
from resnet_dist.errors import MachineError
from resnet_dist.files.outputs import json_problems
from resnet_dist.runtime.wording import counted

TIMEOUT = 3600
FULL_ONLY = ("--regimes", "full", "--no-predict")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run the measurement of `bench` with several numbers of processes here, each with the same batch per process."""

    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig(model="resnet18", weights="none")
    optim: OptimConfig = OptimConfig()
    system: SystemConfig = SystemConfig()
    world_sizes: tuple[int, ...] = (1, 2)
    """Numbers of processes; 1 without a launcher is always measured first."""
    windows: int = 5
    """Windows of which the median is taken."""
    window_steps: int | None = None
    """Steps in a window (default: as many as take half a second)."""
    warmup_steps: int | None = None
    """Steps before the first window (default: 2 on a CPU, 20 on a GPU)."""
    epochs: int = 3
    """Epochs of whole training; the first is reported by itself."""
    epoch_steps: int | None = None
    """Steps in such an epoch, of images spread over DATA (default: 4 per loader process, at least 6)."""
    json: str | None = None
    """Write everything that was measured to this file."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from train_config(self, "DATA").problems()
        yield from cache_problems(self)
        yield from json_problems("--json", self.json, "worlds", "reports")
        yield from out_of_range(self, 1, math.inf, "world_sizes", "windows", "window_steps", "epochs", "epoch_steps")
        yield from out_of_range(self, 0, math.inf, "warmup_steps")
        if not self.world_sizes:
            yield "--world-sizes is empty: name at least one number of processes, such as 2"


def main(cfg: Config) -> int:
    """Measure, print, write the JSON file. Returns the exit code. Raises ResnetDistError."""
    import torch

    from resnet_dist.files.run import to_json, write_atomically

    on_gpu = torch.cuda.is_available()
    # One launched process is another thing than one without a launcher only where it is wrapped in DDP: on GPUs.
    worlds = [(1, False), *((size, True) for size in cfg.world_sizes if size > 1 or on_gpu)]
    reports = []
    for size, launched in worlds:
        print(f"{counted(size, 'process')}{', launched' if launched else ''} ...", flush=True)
        reports.append(report_of(cfg, size, launched, on_gpu))
    rows = [row(report, reports[0]) for report in reports]
    for text in lines(rows):
        print(text)
    if cfg.json is not None:
        write_atomically(Path(cfg.json), to_json({"worlds": rows, "reports": reports}))
    return 0


def report_of(cfg: Config, size: int, launched: bool, on_gpu: bool) -> dict[str, Any]:
    """What `bench` reports with so many processes. Raises MachineError where it fails."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)] if launched else []
    environment = dict(os.environ) if on_gpu else {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory(prefix="resnet-dist-bench-") as folder:
        file = Path(folder) / "bench.json"
        words = [*start, "-m", "resnet_dist", "bench", *arguments_of(cfg), *FULL_ONLY, "--json", str(file)]
        try:
            done = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise MachineError(
                f"bench with {counted(size, 'process')} is not done after {TIMEOUT // 60} minutes"
            ) from None
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [str(done.returncode)]
            raise MachineError(f"bench with {counted(size, 'process')} failed: {errors[0]}")
        report: dict[str, Any] = json.loads(file.read_text())
        return report


def arguments_of(cfg: Config) -> list[str]:
    """The options of `bench` that say what this config says: those that differ from their defaults."""
    words = []
    for option in options_of(Config):
        value = getattr(getattr(cfg, option.section) if option.section else cfg, option.name)
        if value == option.default or option.name in ("world_sizes", "json"):
            continue
        if isinstance(value, bool):
            words.append(option.flag if value else option.flag.replace("--", "--no-", 1))
        else:
            words.append(f"{option.flag}={_text(value)}")
    return words


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def row(report: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Speeds of one number of processes, all together, beside those of one process.

    `efficiency` is the share of what so many processes would do if none held another up: on GPUs as many times the
    speed of one; on a CPU, whose cores they share, the same speed as one that has all cores.
    """
    processes = report["machine"]["processes"]
    units = processes if report["machine"]["device"] == "cuda" else 1
    step, whole = _rates(report)
    step_alone, whole_alone = _rates(alone)
    found = {"processes": processes, "threads": report["machine"]["threads"]}
    found |= {"step_images_per_second": step, "training_images_per_second": whole}
    found |= {"step_efficiency": step / (units * step_alone), "training_efficiency": whole / (units * whole_alone)}
    communication = report["regimes"]["full"]["compute"].get("communication")
    if communication is not None:
        own = communication["step_alone"]["seconds"] / report["regimes"]["full"]["compute"]["step"]["seconds"]
        found |= {"exposed_communication": max(0.0, 1 - own), "all_reduce_bytes": communication["all_reduce_bytes"]}
    return found


def _rates(report: dict[str, Any]) -> tuple[float, float]:
    """Images per second of all processes: of steps alone, and of whole epochs."""
    regime = report["regimes"]["full"]
    step = report["machine"]["processes"] * regime["compute"]["step"]["images_per_second"]
    return step, regime["training"]["later_epochs"]["images_per_second"]


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table as text."""
    yield f"{'processes':>9}{'threads':>9}{'step img/s':>12}{'of linear':>12}{'whole img/s':>13}{'of linear':>12}  sums"
    for entry in rows:
        sums = ""
        if "all_reduce_bytes" in entry:
            speed = entry["all_reduce_bytes"]["median"] / 1e9
            sums = f"{entry['exposed_communication']:.0%} of a step, all-reduce {speed:.2g} GB/s"
        yield (
            f"{entry['processes']:>9}{entry['threads']:>9}{entry['step_images_per_second']:>12,.1f}"
            f"{entry['step_efficiency']:>12.0%}{entry['training_images_per_second']:>13,.1f}"
            f"{entry['training_efficiency']:>12.0%}  {sums}"
        ).rstrip()
