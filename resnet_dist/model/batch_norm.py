"""The BatchNorm layers of a network, and their running statistics in several processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from resnet_dist.errors import UsageError
from resnet_dist.model.resnet import stage_of

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm
FEW_IMAGES = 16  # per process: with fewer, --sync-bn auto synchronises on GPUs, and the plan warns if nothing does


def backbone_batch_norms(model: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """The BatchNorm layers of the backbone, by name. Those of the head belong to the head and always learn."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and stage_of(name) != "head":
            yield name, module


def share_statistics(accelerator: Accelerator, model: nn.Module) -> None:
    """Copy the running statistics of rank 0 to every process, as DDP does if it wraps the whole network."""
    if accelerator.num_processes > 1:
        broadcast(running_statistics(model))


@contextmanager
def averaged_statistics(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside this context, BatchNorm's running statistics are the means over all processes.

    Afterwards each process has its own statistics again, so that evaluating or saving does not change training.
    """
    buffers = running_statistics(model)
    if accelerator.num_processes == 1 or not buffers:
        yield
        return
    local = torch.cat([buffer.flatten() for buffer in buffers.values()])
    means = accelerator.reduce(local.clone(), "mean")
    _put(buffers, means)
    try:
        yield
    finally:
        _put(buffers, local)


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances of all BatchNorm layers, by name."""
    return {
        f"{name}.{kind}": getattr(module, kind)
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
        for kind in ("running_mean", "running_var")
    }


def _put(buffers: dict[str, torch.Tensor], values: torch.Tensor) -> None:
    parts = torch.split(values, [buffer.numel() for buffer in buffers.values()])
    for buffer, part in zip(buffers.values(), parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def counting_batch_norms(model: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers that count their batches but do not need the number: they have a momentum.

    SyncBatchNorm is not among them. It raises an error where it has no counter.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    return [layer for layer in layers if layer.num_batches_tracked is not None and layer.momentum is not None]


@contextmanager
def counted_together(layers: Sequence[BatchNorm]) -> Iterator[None]:
    """In this context, one forward pass of all `layers` raises their counters (`num_batches_tracked`) together.

    By itself every layer in training mode adds 1 to its own counter, which on a GPU is a launch for each of them. It
    does not where this buffer is None, as torch allows. After the pass the buffers are back, with the same values.
    """
    # Not by attribute: to set one of a module takes longer than the launch.
    counting = [layer._buffers for layer in layers if layer.training]
    counters = [buffers["num_batches_tracked"] for buffers in counting]
    for buffers in counting:
        buffers["num_batches_tracked"] = None
    try:
        yield
    finally:
        for buffers, counter in zip(counting, counters, strict=True):
            buffers["num_batches_tracked"] = counter
    if counters:
        torch._foreach_add_([counter for counter in counters if counter is not None], 1)


@dataclass(frozen=True)
class Sync:
    """Whether BatchNorm statistics are computed over all processes, and why."""

    on: bool
    why: str


def choose_sync_bn(asked: str, accelerator: Accelerator, batch_norm_trains: bool, batch_size: int) -> Sync:
    """Whether to use SyncBatchNorm. Raises UsageError if --sync-bn on cannot work."""
    on_gpu = accelerator.device.type == "cuda"
    if asked == "on" and not on_gpu:
        raise UsageError(f"--sync-bn on: SyncBatchNorm works on GPUs only, not on {accelerator.device.type}")
    if asked != "auto":
        return Sync(asked == "on", "--sync-bn")
    wanted = on_gpu and accelerator.num_processes > 1 and batch_norm_trains and batch_size < FEW_IMAGES
    return Sync(wanted, f"{batch_size} images per process" if wanted else "not needed")
