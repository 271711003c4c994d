"""An exponential moving average of the weights, kept on the device beside the model."""

import copy

import torch
from torch import nn


class Ema:
    """average = decay * average + (1 - decay) * weights, after each optimizer step.

    BatchNorm's running statistics are averaged too, its counters copied. The decay is warmed up as
    min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage, so that short runs are not
    dominated by the starting point.

    The tensors of the model are looked up by `follow`, again in every phase, because wrapping the model for several
    processes replaces its buffers. Loading a state dict writes into them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0
        self._averages, self._counters = _floats_and_counters(self.module)
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Average the tensors that this model has now. Call it after the model was wrapped."""
        self._values, self._counted = _floats_and_counters(model)

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's weights after a step to the average. It takes two operations on the device."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
        if self._counters:
            torch._foreach_copy_(self._counters, self._counted)


def _floats_and_counters(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors of a network that are averaged, and those that are copied."""
    tensors = list(model.state_dict(keep_vars=True).values())
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
