"""Parameter groups with a learning rate per stage, the optimizers, and the default learning rates."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from resnet_dist.config.schema import STAGES, OptimConfig, Phase
from resnet_dist.model.resnet import stage_of

# By optimizer: (only a head and BatchNorm learn, pretrained weights are fine-tuned, from scratch). SGD's are those of
# the tutorials (1e-3 for fine-tuning, 0.1 from scratch), Adam's of its paper; fine-tuning takes a tenth of the latter.
DEFAULT_LR = {
    "sgd": (1e-2, 1e-3, 0.1),
    "adam": (1e-3, 1e-4, 1e-3),
    "adamw": (1e-3, 1e-4, 1e-3),
    "rmsprop": (1e-3, 1e-4, 1e-3),
    "adagrad": (1e-2, 1e-3, 1e-2),
}
DEFAULT_WEIGHT_DECAY = {"sgd": 1e-4, "adamw": 1e-2}
DEFAULT_MOMENTUM = {"sgd": 0.9}
# GradScaler starts at 2^16, halves its scale for every skipped step and doubles it after 2,000 good steps. If it has
# halved 21 times more often than doubled, no scale helps: the gradients themselves are not finite.
LOWEST_SCALE = 2.0**-4


@dataclass(frozen=True)
class PlannedOptimizer:
    """The optimizer of every phase.

    Attributes:
        name: its name, as --opt has it.
        base_lr: the value of --lr, typed or automatic.
        lr_factor: what --lr-base-size multiplies every learning rate by; 1.0 without it.
        clip_grad: the largest norm of the gradient; inf for no clipping.
    """

    name: str
    base_lr: float
    lr_factor: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm_and_bias: bool
    clip_grad: float

    @property
    def lr(self) -> float:
        """The learning rate of the head, before the phase's `lr_scale` and the schedule."""
        return self.base_lr * self.lr_factor


def default_lr(opt: str, only_head: bool, pretrained: bool) -> tuple[float, str]:
    """The default base learning rate for an optimizer and what learns in the first phase, and the reason in words."""
    head, fine_tune, scratch = DEFAULT_LR[opt]
    if not pretrained:
        return scratch, f"{opt} from random weights"
    return (head, f"{opt}, only the head or BatchNorm learns") if only_head else (fine_tune, f"{opt}, fine-tuning")


def scaled(cfg: OptimConfig, factor: float) -> OptimConfig:
    """The learning rates that are set, times a factor (the linear scaling rule of Goyal et al. 2017)."""
    return dataclasses.replace(
        cfg,
        lr=None if cfg.lr is None else cfg.lr * factor,
        lr_backbone=None if cfg.lr_backbone is None else cfg.lr_backbone * factor,
        lr_groups=None if cfg.lr_groups is None else {name: rate * factor for name, rate in cfg.lr_groups.items()},
    )


def stage_rates(cfg: OptimConfig, lr: float, phase: Phase) -> dict[str, float]:
    """The learning rate of every stage in a phase. `lr` is the head's, before the phase's `lr_scale`.

    Typed rates (--lr-groups, --lr-backbone, --lr-decay-per-stage) win over the phase's `backbone_lr_scale`.
    """
    rates = dict.fromkeys(STAGES, lr)
    if cfg.lr_groups is not None:
        rates |= cfg.lr_groups
    elif cfg.lr_backbone is not None:
        rates |= {stage: cfg.lr_backbone for stage in STAGES if stage != "head"}
    elif cfg.lr_decay_per_stage is not None:
        rates = {stage: lr * cfg.lr_decay_per_stage**depth for depth, stage in enumerate(reversed(STAGES))}
    elif phase.backbone_lr_scale is not None:
        rates |= {stage: lr * phase.backbone_lr_scale for stage in STAGES if stage != "head"}
    return {stage: rates[stage] * phase.lr_scale for stage in STAGES}


def param_groups(model: nn.Module, planned: PlannedOptimizer, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters that learn, grouped by learning rate and weight decay: a step is one fused operation per group.

    `rates` has the learning rate of every stage that learns. Each group has the `stages` and the `params` in it, `lr`,
    `base_lr` (what the schedule multiplies) and `weight_decay`. BatchNorm and biases (parameters of one dimension) have
    no weight decay unless the settings say so.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for stage, rate in rates.items():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and stage_of(name) == stage:
                decay = planned.weight_decay if parameter.ndim > 1 or planned.decay_norm_and_bias else 0.0
                new = {"stages": [], "params": [], "lr": rate, "base_lr": rate, "weight_decay": decay}
                group = groups.setdefault((rate, decay), new)
                group["params"].append(parameter)
                if stage not in group["stages"]:
                    group["stages"].append(stage)
    return list(groups.values())


def rates_now(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current learning rate of every stage that learns, from the stem to the head."""
    rates = {stage: group["lr"] for group in optimizer.param_groups for stage in group["stages"]}
    return {stage: rates[stage] for stage in STAGES if stage in rates}


def build_optimizer(groups: list[dict[str, Any]], planned: PlannedOptimizer) -> torch.optim.Optimizer:
    """The torch optimizer over the groups. It is fused if torch has that, because fused ones can skip a step on the
    device.
    """
    device = groups[0]["params"][0].device.type
    fused = True if device in ("cpu", "cuda") else None
    if planned.name == "sgd":
        sgd = torch.optim.SGD(groups, momentum=planned.momentum, nesterov=planned.nesterov, fused=fused)
        if planned.momentum:
            start_momentum_at_zero(sgd)
        return sgd
    if planned.name == "rmsprop":
        return torch.optim.RMSprop(groups, momentum=planned.momentum)
    if planned.name == "adagrad":
        return torch.optim.Adagrad(groups, fused=fused if has_fused_adagrad(device) else None)
    return (torch.optim.AdamW if planned.name == "adamw" else torch.optim.Adam)(groups, fused=fused)


def has_fused_adagrad(device: str) -> bool:
    """Whether this torch has a fused Adagrad for a type of device: for CUDA, torch 2.11 has none and torch 2.15 has
    one.
    """
    parameter = torch.zeros(1, device=device, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    try:
        torch.optim.Adagrad([parameter], fused=True).step()
    except RuntimeError:
        return False
    return True


def start_momentum_at_zero(optimizer: torch.optim.SGD) -> None:
    """Give every parameter a momentum buffer of zeros. The first step is the same as without a buffer.

    torch creates the buffers of fused SGD in its first step, uninitialised. If that step is skipped because a gradient
    is not finite, they stay uninitialised, and the second step would apply them.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def step_if_finite(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
    """Take an optimizer step unless `bad`, a float32 on the device, is 1: then nothing changes, counters included.

    Fused optimizers read it on the device (the protocol of GradScaler); for the others the host reads it.
    """
    plain: Any = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not plain.defaults.get("fused"):
        if not bool(bad):
            optimizer.step()
        return
    plain.found_inf = bad
    optimizer.step()
    del plain.found_inf


def scaled_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, skipped: torch.Tensor, bad: torch.Tensor
) -> None:
    """Take an optimizer step under fp16. GradScaler skips it and lowers its scale if a gradient is not finite.

    `skipped`, float32 on the device, counts the skipped steps. `bad`, also float32 there, becomes 1 if the scale falls
    below `LOWEST_SCALE`. Neither waits for the device. Needs a backward pass before it.
    """
    scale = scaler._scale  # on the device; get_scale() would wait for it
    assert scale is not None, "set by the first backward pass"
    before = scale.clone()
    optimizer.step()
    skipped += scale < before
    bad.logical_or_(scale < LOWEST_SCALE)
