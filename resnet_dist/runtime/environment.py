"""What the launcher and the machine say: the only reader of RANK, WORLD_SIZE, OMP_NUM_THREADS; no torch here."""

import functools
import math
import os
import sys
from pathlib import Path

from resnet_dist.errors import MachineError

# What a launcher tells every process; torch needs all five to let the processes find each other.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
CGROUP = Path("/sys/fs/cgroup")


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def rank() -> int:
    """This process's number in the whole job, 0 where there is no launcher."""
    return _number("RANK", 0)


def world_size() -> int:
    """How many processes the launcher started, 1 where there is none."""
    return max(1, _number("WORLD_SIZE", 1))


def local_world_size() -> int:
    """How many of them run on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", world_size()))


def processes_here() -> tuple[int, bool]:
    """How many of them are known to run on this machine, and whether that is all; only some launchers say it."""
    if os.environ.get("LOCAL_WORLD_SIZE"):
        return local_world_size(), True
    return _number("LOCAL_RANK", 0) + 1, False


def check() -> None:
    """Raise MachineError where the variables of a launcher are set in part, or hold what cannot be."""
    given = {name: os.environ[name] for name in (*VARIABLES, "LOCAL_WORLD_SIZE") if os.environ.get(name)}
    numbers = {name: value for name, value in given.items() if name in NUMBERS}
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(given):
        return  # an address alone, which some clusters always set, does no harm
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    remedy = "start with accelerate launch or torchrun, or unset them all for one process"
    for name, value in numbers.items():
        if not value.isdecimal() or int(value) > 65_535:
            raise MachineError(f"{name}={value}: not a whole number from 0 to 65535; {remedy}")
    world, number = _number("WORLD_SIZE", 1), _number("RANK", 0)
    alone = "LOCAL_RANK" not in given and (world, number) == (1, 0)  # as if nothing were set
    if not alone and (missing := [name for name in VARIABLES if name not in given]):
        raise MachineError(f"{shown}: set, but not {', '.join(missing)}; {remedy}")
    here = _number("LOCAL_WORLD_SIZE", world)
    if world <= number or here <= _number("LOCAL_RANK", 0) or world < here:
        raise MachineError(f"{shown}: these contradict each other; {remedy}")


def is_distributed() -> bool:
    """Whether a launcher started this process as one of a job."""
    return "WORLD_SIZE" in os.environ


def is_launched() -> bool:
    """Whether accelerate launch or torchrun started this process."""
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def has_launcher() -> bool:
    """Whether the parent of this process is accelerate launch or torchrun, whose end is to be its own.

    Not so where a shell started it, which may end while its processes go on.
    """
    return ("TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ) and _parent_is_python()


def is_orphan() -> bool:
    """Whether torchrun started this process (accelerate launch does it through torchrun) and has ended already.

    It gives each process a session of its own. Known on Linux only.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    has_session = os.getsid(0) == os.getpid()
    return has_session and not _parent_is_python()


def _parent_is_python() -> bool:
    """Whether the parent runs Python. True where the system does not say."""
    if sys.platform != "linux":
        return True
    parent = Path(f"/proc/{os.getppid()}")
    try:
        program = (parent / "exe").readlink()
    except OSError:  # another user's, or outside of this container
        program = Path("".join(_lines(parent / "cmdline")).partition("\0")[0])
    return "python" in program.name.lower() or program == Path("/proc/self/exe").readlink()


def is_one_of_several() -> bool:
    """Whether accelerate launch was told of several processes and started this one only, as `--cpu` makes it do."""
    said = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    mpi = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
    return said and "WORLD_SIZE" not in os.environ and not mpi


def visible_gpus() -> str:
    """What limits the GPUs that this process sees, in words."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "CUDA_VISIBLE_DEVICES is not set" if value is None else f"CUDA_VISIBLE_DEVICES={value}"


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
    """CPU cores that this process may use: those that it may run on, or fewer where its container has a quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, cpu_quota(CGROUP))))


def cpu_quota(root: Path) -> float:
    """The CPUs of time that the container may take, by version 1 or 2 of control groups; infinity without a limit.

    `root` is where they are mounted. A container sees its own group there, and so does a process in a group below it,
    whose limits and those of the groups above it all hold.
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
    """The limit of one group; infinity where it has none."""
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
    """Whether this CPU multiplies bf16; without that, oneDNN's bf16 is many times slower than float32."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, such as avx512_bf16, in Linux's words; empty elsewhere."""
    lines = _lines("/proc/cpuinfo")
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
