"""The layers of a network: output shapes, parameters, and FLOPs counted by torch's own counter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.config.schema import ModelConfig, Phase
from resnet_dist.model.resnet import Architecture, empty
from resnet_dist.model.trainable import select, set_trainable, updating_batch_norms
from resnet_dist.runtime.wording import counted

COLUMNS = ("layer", "kind", "output", "parameters", "trainable", "MFLOPs")


@dataclass(frozen=True)
class Layer:
    """A layer that computes something.

    `shape`: of its output, without the batch. `flops`: of the forward of one image (2 per multiply-add).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    trainable: int
    flops: int


@dataclass(frozen=True)
class Summary:
    """The layers of a network, and what learns in one phase.

    Attributes:
        layers: in the order in which they run.
        phase: the phase that decides what is trainable.
        updating: the number of BatchNorm layers whose statistics are updated.
    """

    layers: Sequence[Layer]
    phase: Phase
    updating: int

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A row of text for each layer, with the values of COLUMNS."""
        for layer in self.layers:
            counts = (f"{n:,}" if n else "" for n in (layer.parameters, layer.trainable))
            flops = f"{layer.flops / 1e6:,.1f}" if layer.flops else ""
            yield layer.name, layer.kind, " x ".join(map(str, layer.shape)), *counts, flops

    def lines(self) -> Iterator[str]:
        """The totals as text."""
        parameters, trainable, flops = (
            sum(getattr(layer, name) for layer in self.layers) for name in ("parameters", "trainable", "flops")
        )
        trained = f"trainable {trainable:,} ('{self.phase.trainable}')"
        yield f"parameters {parameters:,}, {trained}, {4 * parameters / 2**20:.1f} MiB in float32"
        updates = f"BatchNorm statistics update in {counted(self.updating, 'layer')}"
        yield f"forward {flops / 1e9:.3f} GFLOPs per image (2 per multiply-add); {updates}"


def summary_of(cfg: ModelConfig, num_classes: int, img_size: int, phase: Phase) -> Summary:
    """Summarise a network without computing anything. Raises UsageError if the phase selects nothing."""
    model = empty(Architecture.of(cfg, num_classes))
    set_trainable(model, select(model, phase.trainable))
    return Summary(summarise(model, img_size), phase, len(updating_batch_norms(model, phase)))


def summarise(model: nn.Module, img_size: int) -> list[Layer]:
    """The layers of a network in the order in which they run, for one image of (3, img_size, img_size).

    On the meta device nothing is computed. The training mode of the model is restored.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in _leaves(model)}

    def note_shape(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        shapes[names[module]] = tuple(output.shape[1:])

    hooks = [module.register_forward_hook(note_shape) for module in names]
    was_training = model.training
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.empty(1, 3, img_size, img_size, device=device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    flops = _flops_by_layer(counter)
    modules = {name: module for module, name in names.items()}
    return [_layer(name, modules[name], shape, flops.get(name, 0)) for name, shape in shapes.items()]


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own or without children."""
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None or not any(module.children()):
            yield name, module


def _flops_by_layer(counter: FlopCounterMode) -> dict[str, int]:
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    return {name.partition(".")[2]: sum(by_operation.values()) for name, by_operation in counts.items()}


def _layer(name: str, module: nn.Module, shape: tuple[int, ...], flops: int) -> Layer:
    parameters = list(module.parameters(recurse=False))
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return Layer(name, type(module).__name__, shape, sum(p.numel() for p in parameters), trainable, flops)
