"""An exponential moving average of the weights, kept on the device beside the model."""

import copy

import torch
from torch import nn


class Ema:
    """average = decay * average + (1 - decay) * weights, after each optimizer step.

    BatchNorm's running statistics are averaged too, its counters copied. The decay is warmed up as
    min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage, so that short runs are not
    dominated by the starting point.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages, values = list(self.module.state_dict().values()), list(model.state_dict().values())
        floating = [(a, v) for a, v in zip(averages, values, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [v for _, v in floating], 1 - decay)
        for average, value in zip(averages, values, strict=True):
            if not average.is_floating_point():
                average.copy_(value)
