"""What a run will do, phase by phase: automatic values decided with their reasons, and the plan in words."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from resnet_dist.config.schema import OptimConfig, Phase, TrainConfig
from resnet_dist.model.batch_norm import backbone_batch_norms
from resnet_dist.model.resnet import stage_of
from resnet_dist.model.start import StartingPoint
from resnet_dist.model.trainable import select, updating_batch_norms
from resnet_dist.runtime.wording import counted
from resnet_dist.training.optim import DEFAULT_MOMENTUM, DEFAULT_WEIGHT_DECAY, default_lr, stage_rates


def resolve(cfg: TrainConfig, model: nn.Module, global_batch: int) -> tuple[TrainConfig, list[str]]:
    """The config with everything automatic that shapes the result decided, and a line with the reason for each."""
    cfg = cfg.with_phase_epochs()
    changes: dict[str, Any] = {}
    reasons = []
    if cfg.optim.lr is None:
        start = StartingPoint.of(cfg.model.weights, cfg.run.init_from)
        lr, why = default_lr(cfg.optim.opt, _only_head(model, cfg.phase[0]), start.pretrained)
        changes["lr"] = lr
        reasons.append(f"lr {lr:g} (automatic: {why})")
    if cfg.optim.weight_decay is None:
        changes["weight_decay"] = DEFAULT_WEIGHT_DECAY.get(cfg.optim.opt, 0.0)
        reasons.append(f"weight decay {changes['weight_decay']:g} (automatic: usual for {cfg.optim.opt})")
    if cfg.optim.momentum is None:
        changes["momentum"] = DEFAULT_MOMENTUM.get(cfg.optim.opt, 0.0)
    optim = dataclasses.replace(cfg.optim, **changes)
    if optim.lr_base_size is not None:
        factor = global_batch / optim.lr_base_size
        optim = scaled(optim, factor)
        reasons.append(
            f"learning rates times {factor:g} (global batch {global_batch} / --lr-base-size): lr {optim.lr:g}"
        )
    return dataclasses.replace(cfg, optim=optim), reasons


def scaled(optim: OptimConfig, factor: float) -> OptimConfig:
    """All learning rates times a factor (the linear scaling rule of Goyal et al. 2017); that is then done with."""
    changes: dict[str, Any] = {
        name: getattr(optim, name) * factor for name in ("lr", "lr_backbone") if getattr(optim, name) is not None
    }
    if optim.lr_groups is not None:
        changes["lr_groups"] = {stage: rate * factor for stage, rate in optim.lr_groups.items()}
    return dataclasses.replace(optim, lr_base_size=None, **changes)


def _only_head(model: nn.Module, phase: Phase) -> bool:
    norms = {name for name, _ in backbone_batch_norms(model)}
    return all(stage_of(name) == "head" or name.rpartition(".")[0] in norms for name in select(model, phase.trainable))


@dataclass(frozen=True)
class PhasePlan:
    """One phase in numbers."""

    epochs: int
    steps: int
    trainable: str
    parameters: int
    parameters_in_all: int
    batch_norm: str
    rates: dict[str, float]


def plan(cfg: TrainConfig, model: nn.Module, steps_per_epoch: int) -> list[PhasePlan]:
    """What each phase of a resolved config will do to `model`."""
    parameters = dict(model.named_parameters())
    norms = len(list(backbone_batch_norms(model)))
    plans = []
    for phase in cfg.phase:
        names = select(model, phase.trainable)
        learning = {stage_of(name) for name in names}
        updating = len(updating_batch_norms(model, phase))
        rates = {stage: rate for stage, rate in stage_rates(cfg.optim, phase).items() if stage in learning}
        epochs = phase.epochs or 0
        plans.append(
            PhasePlan(
                epochs=epochs,
                steps=epochs * steps_per_epoch,
                trainable=phase.trainable,
                parameters=sum(parameters[name].numel() for name in names),
                parameters_in_all=sum(p.numel() for p in parameters.values()),
                batch_norm=_batch_norm_text(updating, norms),
                rates=rates,
            )
        )
    return plans


def _batch_norm_text(updating: int, norms: int) -> str:
    if updating in (0, norms):
        return "statistics update" if updating else "statistics frozen"
    return f"statistics update in {updating} of {norms} layers"


def plan_lines(plans: list[PhasePlan], cfg: TrainConfig) -> list[str]:
    """The plan as lines of text."""
    how = f"{cfg.optim.opt}, {cfg.schedule.sched} schedule"
    lines = [f"{cfg.model.model}, {counted(len(plans), 'phase')}, {counted(cfg.run.epochs, 'epoch')}: {how}"]
    for number, item in enumerate(plans, 1):
        share = 100 * item.parameters / item.parameters_in_all
        rates = " ".join(f"{stage}={rate:g}" for stage, rate in item.rates.items())
        lines.append(
            f"  phase {number}: {counted(item.epochs, 'epoch')}, {counted(item.steps, 'step')}; "
            f"learns '{item.trainable}', {item.parameters:,} of {item.parameters_in_all:,} parameters ({share:.1f} %)"
        )
        lines.append(f"           BatchNorm {item.batch_norm}; lr {rates}")
    return lines
