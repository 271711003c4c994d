"""Code version, packages and hardware of a run. No environment variables, host name or path."""

import contextlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from resnet_dist.runtime import environment as launcher

PACKAGES = ("resnet-dist", "torch", "torchvision", "accelerate", "safetensors", "numpy", "pillow", "scikit-learn")


def made_with() -> dict[str, Any]:
    """Git state, package versions, Python, platform and hardware of this process, as plain JSON values."""
    return {
        "git": git_state(Path.cwd()),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": hardware(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The git commit of `folder`, and whether tracked files were changed; None outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git; None without git or a repository, or after ten seconds."""
    try:
        # core.fsmonitor lets a repository run a program, so it is switched off.
        command = ["git", "-c", "core.fsmonitor=false", "-C", os.fspath(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of the packages that affect the result, and of the CUDA and cuDNN of torch."""
    import torch

    by_package = {}
    for name in PACKAGES:
        try:
            by_package[name] = version(name)
        except PackageNotFoundError:  # for example, torch was built under another name
            by_package[name] = "unknown"
    if torch.version.cuda is not None:
        by_package |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    return by_package


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, the GPUs that torch sees with their memory, and the driver."""
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices]
    return {"cpu": cpu_model(), "cores": launcher.cores(), "gpus": gpus, "driver": driver() if gpus else None}


def cpu_model() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver() -> str | None:
    """The version of the NVIDIA driver, if it can be found."""
    return next(iter(_nvidia_smi("driver_version")), None)


def gpu_names() -> list[str]:
    """The names of the NVIDIA GPUs; without torch, which may be built without CUDA."""
    return _nvidia_smi("name")


def _nvidia_smi(field: str) -> list[str]:
    """What nvidia-smi says about each GPU; empty without it, or after ten seconds."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []


def forget_peak_memory() -> None:
    """Reset `peak_memory`, if the system supports it: one process may do several runs."""
    import torch

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in MiB: on the host, without loader processes, and on its GPU."""
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"host_mib": _peak_host_bytes() >> 20, "gpu_mib": gpu >> 20}


def _peak_host_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        if sys.platform == "win32":
            return 0
        import resource  # absent on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
