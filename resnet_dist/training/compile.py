"""Whether and how the network is compiled by torch.compile (Ansel et al. 2024)."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from resnet_dist.errors import UsageError
from resnet_dist.model.head import Dropout

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


def check_graphs(accelerator: Accelerator) -> None:
    """Raise UsageError if --compile graphs cannot work here.

    With several processes it is refused because torch does not capture BatchNorm under DDP (pytorch issue 139207).
    """
    if accelerator.device.type != "cuda":
        raise UsageError(f"--compile graphs: CUDA graphs need a GPU, not {accelerator.device.type}; take --compile on")
    if accelerator.num_processes > 1:
        raise UsageError("--compile graphs: works with one process only; take --compile on")


def compiled(net: nn.Module, graphs: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network compiled for the one input shape of training; evaluation uses the plain network.

    With `graphs`, forward and backward pass are recorded as CUDA graphs and replayed. A replay writes into the same
    memory: its logits and gradients must be used before the next call.
    """
    if not graphs:
        forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(net, dynamic=False)
        return forward
    return _replayed(net)


def _replayed(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network as CUDA graphs."""
    forward = torch.compile(net, dynamic=False, mode="reduce-overhead")
    dropouts = [module for module in net.modules() if isinstance(module, Dropout) and module.p]
    keys: list[torch.Tensor] = []  # of the samples of a step, always at the same address

    def call(values: torch.Tensor) -> torch.Tensor:
        # torch records the addresses of the tensors that modules hold, and records again if one of them changes.
        for dropout in dropouts:
            assert dropout.keys is not None, "set before each step"
            if not keys:
                keys.append(torch.empty_like(dropout.keys))
            dropout.keys = keys[0].copy_(dropout.keys)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        logits: torch.Tensor = forward(values)
        return logits

    return call
