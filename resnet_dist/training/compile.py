"""Whether and how the network is compiled by torch.compile (Ansel et al. 2024)."""

from collections.abc import Callable

import torch
from torch import nn

# What a run must win back, and the part of a step that compiling is taken to save. Both are careful estimates from
# others' measurements on GPUs (timm: 1.4 to 1.6 times faster, half a minute to a minute and a half to compile).
COST_SECONDS = 90.0
GAIN = 0.2


def pays(device: torch.device, steps_left: int, step_seconds: float) -> bool:
    """Whether compiling now is expected to shorten the run.

    Never on a CPU: there the compiled step of resnet18 is slower (29 against 32 images/s in bf16, 13 against 17 in
    float32; two cores of an EPYC Zen 4, torch 2.15).
    """
    return device.type == "cuda" and steps_left * step_seconds * GAIN > COST_SECONDS


def compiled(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network compiled for the one input shape of training; evaluation uses the plain network."""
    forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(net, dynamic=False)
    return forward
