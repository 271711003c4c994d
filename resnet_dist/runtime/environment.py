"""Launcher variables (this is the only reader of RANK, WORLD_SIZE, OMP_NUM_THREADS), cores and memory. No torch."""

import functools
import math
import os
import sys
from pathlib import Path

from resnet_dist.errors import MachineError

# Set by a launcher for every process; torch needs all five to connect the processes.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
CGROUP = Path("/sys/fs/cgroup")


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def rank() -> int:
    """The rank of this process, 0 without a launcher."""
    return _number("RANK", 0)


def world_size() -> int:
    """The number of processes of the job, 1 without a launcher."""
    return max(1, _number("WORLD_SIZE", 1))


def local_world_size() -> int:
    """The number of processes of the job on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", world_size()))


def processes_here() -> tuple[int, bool]:
    """The number of processes on this machine, and whether it is exact. Without LOCAL_WORLD_SIZE it is a minimum."""
    if os.environ.get("LOCAL_WORLD_SIZE"):
        return local_world_size(), True
    return _number("LOCAL_RANK", 0) + 1, False


def check() -> None:
    """Raise MachineError if launcher variables are missing, invalid or contradict each other."""
    given = {name: os.environ[name] for name in (*VARIABLES, "LOCAL_WORLD_SIZE") if os.environ.get(name)}
    numbers = {name: value for name, value in given.items() if name in NUMBERS}
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(given):
        return  # some clusters always set the address, which is harmless
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    remedy = "start with accelerate launch or torchrun, or unset them all to run one process"
    for name, value in numbers.items():
        if not value.isdecimal() or int(value) > 65_535:
            raise MachineError(f"{name}={value}: must be an integer in 0..65535; {remedy}")
    world, number = _number("WORLD_SIZE", 1), _number("RANK", 0)
    alone = "LOCAL_RANK" not in given and (world, number) == (1, 0)  # the same as no launcher
    if not alone and (missing := [name for name in VARIABLES if name not in given]):
        raise MachineError(f"{shown} set, but {', '.join(missing)} missing; {remedy}")
    here = _number("LOCAL_WORLD_SIZE", world)
    if world <= number or here <= _number("LOCAL_RANK", 0) or world < here:
        raise MachineError(f"{shown}: these contradict each other; {remedy}")


def is_distributed() -> bool:
    """Whether a launcher started this process as part of a job."""
    return "WORLD_SIZE" in os.environ


def is_launched() -> bool:
    """Whether accelerate launch or torchrun started this process."""
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def has_launcher() -> bool:
    """Whether the parent process is accelerate launch or torchrun. This process must then end with it.

    False if a shell is in between, because a shell may end before its processes.
    """
    return ("TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ) and _parent_is_python()


def is_orphan() -> bool:
    """Whether torchrun (which accelerate launch uses) started this process and has already ended.

    torchrun starts each process in its own session. Detected on Linux only.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    has_session = os.getsid(0) == os.getpid()
    return has_session and not _parent_is_python()


def _parent_is_python() -> bool:
    """Whether the parent process runs Python; True if that is unknown."""
    if sys.platform != "linux":
        return True
    parent = Path(f"/proc/{os.getppid()}")
    try:
        program = (parent / "exe").readlink()
    except OSError:  # of another user, or outside this container
        program = Path("".join(_lines(parent / "cmdline")).partition("\0")[0])
    return "python" in program.name.lower() or program == Path("/proc/self/exe").readlink()


def is_one_of_several() -> bool:
    """Whether accelerate launch was asked for several processes but started only this one, as with `--cpu`."""
    has_address = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    mpi = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
    return has_address and "WORLD_SIZE" not in os.environ and not mpi


def visible_gpus() -> str:
    """A text about CUDA_VISIBLE_DEVICES."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "CUDA_VISIBLE_DEVICES is not set" if value is None else f"CUDA_VISIBLE_DEVICES={value}"


def cpu_is_asked_for() -> bool:
    """Whether the CPU must be used even if there is a GPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")


def mixed_precision() -> str | None:
    """The precision that `accelerate launch` passes on: the user's choice, or its default "no"."""
    value = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return value if value in ("no", "fp16", "bf16") else None


def omp_threads() -> int | None:
    """OMP_NUM_THREADS, if it is a positive integer."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def cores() -> int:
    """CPU cores that this process may use: its CPU affinity, limited by the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, cpu_quota(CGROUP))))


def cpu_quota(root: Path) -> float:
    """The CPU quota of the container, in CPUs, from cgroups version 1 or 2; infinity without a limit.

    `root` is the mount point of the cgroups. The limits of this process's group and of all groups above it apply.
    """
    limits = [math.inf]
    for line in _lines("/proc/self/cgroup"):
        _, controllers, below = line.strip().split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = (root / "cpu", root / "cpu,cpuacct") if controllers else (root, root / "unified")
        for mount in mounts:
            group = mount / below.lstrip("/")
            limits += [_quota_of(one) for one in (group, *group.parents) if one.is_relative_to(mount)]
    return min(limits)


def _quota_of(group: Path) -> float:
    """The limit of one group; infinity if it has none."""
    words = " ".join(_lines(group / "cpu.max")).split()  # version 2: "200000 100000", or "max 100000"
    if not words:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [line.strip() for name in names for line in _lines(group / name)]
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        return math.inf
    return int(words[0]) / int(words[1])


def _lines(file: str | Path) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions; without them, bf16 in oneDNN is many times slower than float32."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU flags that Linux reports, such as avx512_bf16; empty on other systems."""
    lines = _lines("/proc/cpuinfo")
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def available_memory() -> int:
    """Bytes of free memory of the machine or of the container, the smaller of the two."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free += [int(limit) - int(used)] if limit.isdigit() else []
    except OSError:
        pass
    return max(0, min(free, default=4 << 30))
