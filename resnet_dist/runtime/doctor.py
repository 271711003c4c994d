"""What this machine has, and what `accelerate launch` would start on it."""

import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.wording import counted

PORT = 29500  # torchrun's and accelerate's default


def facts() -> Iterator[tuple[str, str]]:
    """Names and values: versions, GPUs, cores, disk, port and launch."""
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
    yield f"port {PORT}", "free" if _is_free(PORT) else "in use: give --main_process_port N (0: any free port)"
    yield "accelerate launch", would_start()


def _space(path: Path) -> str:
    if not path.is_dir():
        return "does not exist"
    usage = shutil.disk_usage(path)
    return f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def would_start() -> str:
    """How many processes `accelerate launch` starts without arguments, and which file says so."""
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        number = max(1, torch.cuda.device_count())
        return f"{counted(number, 'process')} (no {Path(default_config_file).name}); see launch/README.md"
    config = load_config_from_file(default_config_file)
    return f"{counted(config.num_processes, 'process')}, {config.distributed_type} ({default_config_file})"
