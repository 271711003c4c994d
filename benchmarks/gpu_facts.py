"""What the machine is, for the record of a measurement: the GPU, the versions, the cores and what they may use."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import disk_usage

import torch

PACKAGES = ("torchvision", "accelerate", "triton", "timm", "numpy", "pillow", "onnxruntime", "safetensors", "pytest")


def main() -> None:
    """Print it."""
    print("torch", torch.__version__, "cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
    for name in PACKAGES:
        try:
            print(name, version(name))
        except PackageNotFoundError:
            print(name, "is missing")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0), "nccl", torch.cuda.nccl.version())
        print("bf16", torch.cuda.is_bf16_supported(including_emulation=False))
        for dtype in (torch.float16, torch.bfloat16, torch.float32):  # which kernels BatchNorm takes
            x, ones = torch.rand(8, 64, 56, 56, device="cuda", dtype=dtype), torch.ones(64, device="cuda")
            x = x.contiguous(memory_format=torch.channels_last)
            print(dtype, torch._C._select_batch_norm_backend(x, ones, ones, ones, ones, True, 1e-5))
    quota = Path("/sys/fs/cgroup/cpu.max")
    print("cores", len(os.sched_getaffinity(0)), "quota", quota.read_text().strip() if quota.exists() else "none")
    shm = os.statvfs("/dev/shm")
    print("/dev/shm", shm.f_blocks * shm.f_frsize >> 20, "MiB; free in /tmp", disk_usage("/tmp").free >> 30, "GiB")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    print(next((line for line in lines if line.startswith("model name")), "unknown CPU"))


if __name__ == "__main__":
    main()
