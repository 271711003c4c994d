"""What the launcher says in the environment. The only reader of RANK, WORLD_SIZE and their like; no torch here."""

import os


def rank() -> int:
    """This process's number in the whole job, 0 where there is no launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launcher started, 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_from_environment() -> int | None:
    """OMP_NUM_THREADS, if set by the user: a 1 under a launcher is the launcher's own doing and does not count."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if not value.isdigit() or int(value) < 1 or (value == "1" and "WORLD_SIZE" in os.environ):
        return None
    return int(value)
