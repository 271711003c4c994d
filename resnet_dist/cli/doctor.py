"""`resnet-dist doctor`: what this machine has, what a launch would start, and a proof that two processes equal one."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from resnet_dist.errors import MachineError
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.wording import counted

PORT = 29500  # torchrun's and accelerate's default
TIMEOUT = 300


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show devices, versions, cores, disk and ports, what a launch would start, and run a two-process self-test."""

    self_test: bool = True
    """Train on a few tiny images with one process and with two, and compare."""

    def problems(self) -> Iterator[str]:
        """Nothing here can be wrong by itself."""
        return iter(())


def main(cfg: Config) -> int:
    """Print what is found. Returns the exit code. Raises MachineError if the self-test fails."""
    for name, value in facts():
        print(f"{name:<18} {value}")
    if cfg.self_test:
        print("self-test          training with one process and with two, on the CPU ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="resnet-dist-doctor-") as folder:
            for line in self_test(Path(folder)):
                print(f"                   {line}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """Names and values, one line each."""
    import torch

    names = ("resnet-dist", "torch", "torchvision", "accelerate", "safetensors", "numpy", "pillow")
    yield "versions", ", ".join(f"{name} {version(name)}" for name in names)
    yield "python", sys.version.split()[0]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use"
    backends = {"nccl": torch.distributed.is_nccl_available(), "gloo": torch.distributed.is_gloo_available()}
    yield "backends", ", ".join(name for name, there in backends.items() if there)
    yield "cores", f"{launcher.cores()}, OMP_NUM_THREADS={launcher.omp_threads() or 'not set'}"
    yield "bf16 on the CPU", "yes" if {"avx512_bf16", "amx_bf16"} & launcher.cpu_flags() else "no"
    yield "/dev/shm", _space(Path("/dev/shm"))
    yield "disk here", _space(Path.cwd())
    yield f"port {PORT}", "free" if _is_free(PORT) else "in use: give --main_process_port, or 0 for any"
    yield "accelerate launch", would_start()


def _space(path: Path) -> str:
    if not path.is_dir():
        return "not there"
    usage = shutil.disk_usage(path)
    return f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def would_start() -> str:
    """How many processes `accelerate launch` starts without arguments, and from which file it takes that."""
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        number = max(1, torch.cuda.device_count())
        return f"{counted(number, 'process')} (no {Path(default_config_file).name}); see launch/README.md"
    config = load_config_from_file(default_config_file)
    return f"{counted(config.num_processes, 'process')}, {config.distributed_type} ({default_config_file})"


def self_test(folder: Path) -> Iterator[str]:
    """Train and evaluate with one process and with two; a line for each thing that is equal. Raises MachineError."""
    _write_images(folder / "images")
    one, two = folder / "one", folder / "two"
    _train(folder, one, processes=1)
    _train(folder, two, processes=2)
    steps = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    yield _equal("learning rates of all steps", *[[row["lr"] for row in rows] for rows in steps])
    losses = [[row["loss"] for row in rows] for rows in steps]
    worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    if worst > 1e-4:
        raise MachineError(
            f"self-test: the losses of one and two processes differ by {worst:.1e}; see launch/README.md"
        )
    yield f"losses of {counted(len(losses[0]), 'step')}: equal within {worst:.1e}"
    evaluations = []
    for processes in (1, 2):
        out = folder / f"eval{processes}"
        arguments = ["eval", str(one), "--output-dir", str(out), "--batch-size", "3", "--threads", "1"]
        _run(arguments, processes)
        with (out / "predictions.csv").open(newline="") as stream:
            evaluations.append([(row["path"], row["target"], row["prediction"]) for row in csv.DictReader(stream)])
    yield _equal(f"predictions for {len(evaluations[0])} images, every one once", *evaluations)


def _equal(what: str, one: object, two: object) -> str:
    if one != two:
        raise MachineError(f"self-test: {what} differ between one and two processes; see launch/README.md")
    return f"{what}: equal"


def _write_images(folder: Path) -> None:
    """Noise of two classes, 13 for training and 7 for validation: numbers that no batch divides."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 7)):
        for number in range(count):
            pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            pixels[..., number % 2] //= 3
            file = folder / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def _train(folder: Path, run: Path, processes: int) -> None:
    options = (
        "--model resnet18 --weights none --stem small --img-size 16 --head mlp --dropout 0.2 --mixup 0.2 --epochs 3"
    )
    # BatchNorm's statistics are frozen: on a CPU there is none over processes, so each would have its own batch's.
    options += " --batch-norm-stats frozen"
    options += " --trainable layer4,head --global-batch-size 8 --lr 0.01 --sched cosine --log-every 1 --threads 1"
    options += " --mixed-precision no --workers 0"
    _run(["train", str(folder / "images"), *options.split(), "--output-dir", str(run)], processes)


def _run(arguments: Sequence[str], processes: int) -> None:
    command = [sys.executable, "-m", "resnet_dist", *arguments]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *torchrun, "-m", "resnet_dist", *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise MachineError(f"self-test: {processes} process(es) failed: {lines[0] if lines else done.returncode}")
