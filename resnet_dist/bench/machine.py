"""The limits of the machine: speed of matrix products and memory copies, and CPU instructions."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from resnet_dist.bench.timing import Repeats, measure
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.machine import hardware, versions

ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
CPU_SIDE, GPU_SIDE = 2048, 8192  # of the matrices: large enough to be bound by arithmetic
CPU_BYTES, GPU_BYTES = 256 << 20, 2 << 30  # of a copy: larger than the caches


def describe(accelerator: Accelerator) -> dict[str, Any]:
    """Device, cores, threads, instructions and versions."""
    return {
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "cores_per_process": max(1, launcher.cores() // launcher.local_world_size()),
        "isa": [flag for flag in ISA if flag in launcher.cpu_flags()],
        **hardware(),
        "versions": versions(),
    }


def roofs(accelerator: Accelerator, repeats: Repeats) -> dict[str, Any]:
    """Measured limits of one process: FLOP/s of a square matrix product by precision, and bytes/s of a copy.

    All processes measure at the same time, so that each measures its share of the cores.
    """
    device = accelerator.device
    size = CPU_BYTES if device.type == "cpu" else GPU_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    limits: dict[str, Any] = {"gemm_flops": {name: _gemm(accelerator, repeats, name) for name in _precisions(device)}}
    limits["copy_bytes"] = measure(accelerator, lambda: target.copy_(source), repeats).rates(2 * size)
    if device.type == "cuda":
        pinned = torch.ones(size // 8, dtype=torch.uint8).pin_memory()
        to_device = measure(accelerator, lambda: target[: len(pinned)].copy_(pinned, non_blocking=True), repeats)
        limits["host_to_device_bytes"] = to_device.rates(len(pinned))
    return limits


def _precisions(device: torch.device) -> Iterator[str]:
    yield "fp32"
    if device.type == "cuda":
        yield from ("tf32", "fp16", "bf16")
    elif {"avx512_bf16", "amx_bf16"} & launcher.cpu_flags():  # other CPUs emulate it, very slowly
        yield "bf16"


def _gemm(accelerator: Accelerator, repeats: Repeats, precision: str) -> dict[str, float]:
    device = accelerator.device
    side = CPU_SIDE if device.type == "cpu" else GPU_SIDE
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        return measure(accelerator, lambda: torch.mm(a, b, out=out), repeats).rates(2 * side**3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def gemm_flops(accelerator: Accelerator, roofs: dict[str, Any]) -> float:
    """The measured FLOP/s in the precision of the convolutions."""
    precision = str(accelerator.mixed_precision)
    if precision == "no":
        precision = "tf32" if accelerator.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "fp32"
    speeds = roofs["gemm_flops"]
    return float(speeds.get(precision, speeds["fp32"])["median"])  # not measured on a CPU that emulates bf16


def activation_bytes(accelerator: Accelerator) -> int:
    """Bytes of an activation in memory."""
    return 4 if accelerator.mixed_precision == "no" else 2
