"""What the launcher and the machine say: the only reader of RANK, WORLD_SIZE, OMP_NUM_THREADS; no torch here."""

import functools
import os
from pathlib import Path


def rank() -> int:
    """This process's number in the whole job, 0 where there is no launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launcher started, 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def is_distributed() -> bool:
    """Whether a launcher started this process as one of a job."""
    return "WORLD_SIZE" in os.environ


def is_launched() -> bool:
    """Whether accelerate launch or torchrun started this process."""
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def cpu_is_asked_for() -> bool:
    """Whether the launcher was told to use the CPU although there may be a GPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")


def mixed_precision() -> str | None:
    """The precision that `accelerate launch` passes on: what was asked of it, else its default "no"."""
    value = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return value if value in ("no", "fp16", "bf16") else None


def omp_threads() -> int | None:
    """OMP_NUM_THREADS as a number, if it is one."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16; without that, oneDNN's bf16 is many times slower than float32."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, such as avx512_bf16, in Linux's words; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def available_memory() -> int:
    """Bytes of main memory that can still be taken: of the machine, or of the container where that has less."""
    known = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        known += [int(limit) - int(used)] if limit.isdigit() else []
    except OSError:
        pass
    return max(0, min(known, default=4 << 30))
