"""The work of a training step: floating-point operations and bytes of every pass of every layer.

FLOPs are counted as torch's FlopCounterMode counts them: 2 per multiply-add of convolutions and linear layers. Bytes
are those of eager execution, if every operation reads its inputs from memory and writes its output there once. With
the measured speed of matrix products and of memory they give the least time of each operation, and so the roofline of
a step (Williams et al. 2009).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_dist.model.batch_norm import BatchNorm
from resnet_dist.model.head import ConcatPool

_INDEX_BYTES = 8  # max pooling stores int64 positions


@dataclass(frozen=True)
class Operation:
    """One pass of one layer over a batch: "forward", or backward "to input" or "to weights".

    `values`: the activations that it reads and writes. `extra_bytes`: bytes of other values.
    """

    layer: str
    direction: str
    flops: int
    values: int
    extra_bytes: int = 0

    def bytes(self, width: int) -> int:
        """Bytes that it moves if an activation takes `width` bytes."""
        return self.values * width + self.extra_bytes


def operations(model: nn.Module, shape: Sequence[int]) -> list[Operation]:
    """The operations of a training step on an input of that shape (B, ...), in the model's present mode.

    The backward passes follow `requires_grad`: none before the first trainable parameter, and no gradient of a frozen
    weight. The model must be on the meta device: nothing is computed.
    """
    found: list[Operation] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.extend(_of_layer(names[module], module, inputs[0], output))

    hooks = [module.register_forward_hook(note) for module in names]
    with torch.enable_grad():
        model(torch.empty(*shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def _of_layer(name: str, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Iterator[Operation]:
    """The passes of one layer from `x` to `y`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        per_output = module.weight[0].numel()
        flops, moved = 2 * y.numel() * per_output, x.numel() + y.numel()
        yield Operation(name, "forward", flops, moved)
        if x.requires_grad:
            yield Operation(name, "to input", flops, moved)
        if module.weight.requires_grad:
            yield Operation(name, "to weights", flops, moved)
        return
    moved_by = _passes(module, x.numel(), y.numel())
    if moved_by is not None:
        forward, backward, extra = moved_by
        yield Operation(name, "forward", 0, forward, extra)
        if y.requires_grad:
            yield Operation(name, "to input", 0, backward, extra)


def _passes(module: nn.Module, x: int, y: int) -> tuple[int, int, int] | None:
    """Values moved forward and backward, and further bytes in each, by a layer without matrix products.

    `x` and `y` are the numbers of values of its input and its output.
    """
    if isinstance(module, BatchNorm):
        # Statistics, then read and write; backward two sums over gradient and input, then read both and write.
        return (3 * x, 5 * x, 0) if module.training else (2 * x, 2 * x, 0)
    if isinstance(module, nn.ReLU):
        return 2 * y, 3 * y, 0
    if isinstance(module, BasicBlock | Bottleneck):  # its addition; its layers are counted separately
        return 3 * y, 3 * y, 0
    if isinstance(module, nn.MaxPool2d):
        return x + y, x + y, _INDEX_BYTES * y
    if isinstance(module, nn.AdaptiveAvgPool2d | ConcatPool):
        return x + y, x + y, 0
    return None


def flops(done: Sequence[Operation]) -> int:
    """Floating-point operations of all operations."""
    return sum(operation.flops for operation in done)


def bytes_moved(done: Sequence[Operation], width: int) -> int:
    """Bytes that the operations move, each by itself, if an activation takes `width` bytes."""
    return sum(operation.bytes(width) for operation in done)


def least_seconds(done: Sequence[Operation], flops_per_second: float, bytes_per_second: float, width: int) -> float:
    """The least time of the operations in sequence, each limited by arithmetic or by memory."""
    return sum(max(o.flops / flops_per_second, o.bytes(width) / bytes_per_second) for o in done)
