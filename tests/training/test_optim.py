"""Learning rates per stage, weight decay, and what is taken where no rate is given."""

import math

import pytest
import torch

from resnet_dist.config.schema import OptimConfig, Phase
from resnet_dist.model.resnet import Architecture, empty, stage_of
from resnet_dist.model.trainable import select, set_trainable
from resnet_dist.training import optim
from resnet_dist.training.optim import PlannedOptimizer, param_groups, rates_now, stage_rates
from resnet_dist.training.plan import plan_optimizer
from tests.training.helpers import config_of

STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
ARCHITECTURE = Architecture(name="resnet18", stem="standard", head="linear", head_hidden=(), dropout=0, num_classes=3)


def planned_optimizer(
    name: str = "sgd", weight_decay: float = 0.0, decay_norm_and_bias: bool = False
) -> PlannedOptimizer:
    return PlannedOptimizer(
        name=name,
        base_lr=0.1,
        lr_factor=1.0,
        momentum=0.0,
        nesterov=False,
        weight_decay=weight_decay,
        decay_norm_and_bias=decay_norm_and_bias,
        clip_grad=math.inf,
    )


@pytest.mark.parametrize(
    ("cfg", "lr", "phase", "expected"),
    [
        (OptimConfig(), 0.1, Phase(), [0.1] * 6),
        (OptimConfig(), 0.1, Phase(lr_scale=0.5), [0.05] * 6),
        (OptimConfig(lr_backbone=1e-3), 0.1, Phase(), [1e-3] * 5 + [0.1]),
        (OptimConfig(), 0.1, Phase(backbone_lr_scale=0.01), [1e-3] * 5 + [0.1]),
        (OptimConfig(lr_backbone=0.02), 0.1, Phase(backbone_lr_scale=0.01), [0.02] * 5 + [0.1]),
        (OptimConfig(lr_decay_per_stage=0.5), 1.0, Phase(), [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]),
        (OptimConfig(lr_groups={"stem": 1e-5, "layer4": 1e-4}), 0.1, Phase(), [1e-5, 0.1, 0.1, 0.1, 1e-4, 0.1]),
        (OptimConfig(lr_groups={"head": 1.0}), 0.1, Phase(lr_scale=0.1), [0.01] * 5 + [0.1]),
    ],
)
def test_rate_of_every_stage(cfg: OptimConfig, lr: float, phase: Phase, expected: list[float]) -> None:
    rates = stage_rates(cfg, lr, phase)
    assert [rates[stage] for stage in STAGES] == pytest.approx(expected)


@pytest.mark.parametrize("decay_all", [False, True])
def test_every_learning_parameter_is_in_one_group(decay_all: bool) -> None:
    """No frozen parameter is given to the optimizer, and weight decay spares BatchNorm and biases unless asked."""
    model = empty(ARCHITECTURE)
    set_trainable(model, select(model, "layer3 layer4 head"))
    planned = planned_optimizer(weight_decay=0.01, decay_norm_and_bias=decay_all)
    rates = dict.fromkeys(("layer3", "layer4", "head"), 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in param_groups(model, planned, rates) for p in group["params"]}
    assert sorted(decay) == sorted(n for n in names.values() if stage_of(n) in ("layer3", "layer4", "head"))
    for name, value in decay.items():
        is_norm_or_bias = ".bn" in name or "downsample.1" in name or name.endswith("bias")
        assert value == (0.01 if decay_all or not is_norm_or_bias else 0.0), name


@pytest.mark.parametrize(
    ("rates", "groups"),
    [
        (dict.fromkeys(STAGES, 0.1), 2),
        (dict.fromkeys(STAGES, 0.001) | {"head": 0.1}, 4),
        ({stage: 0.1 * number for number, stage in enumerate(STAGES)}, 12),
        ({"stem": 0.1, "layer1": 0.2, "layer2": 0.1, "head": 0.2}, 4),
    ],
)
def test_stages_of_one_rate_share_their_groups(rates: dict[str, float], groups: int) -> None:
    """Twelve groups would be twelve launches; every stage still shows its own rate, in the order of the stages."""
    model = empty(ARCHITECTURE)
    set_trainable(model, [name for name, _ in model.named_parameters() if stage_of(name) in rates])
    made = param_groups(model, planned_optimizer(weight_decay=0.01), rates)
    assert len(made) == groups
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, learning)) == sorted(id(parameter) for group in made for parameter in group["params"])
    now = rates_now(torch.optim.SGD(made))
    assert now == rates and list(now) == [stage for stage in STAGES if stage in rates]


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        ("--trainable head", 1e-2),
        ("--trainable head,batchnorm", 1e-2),
        ("", 1e-3),
        ("--weights none", 0.1),
        ("--opt adam --trainable head", 1e-3),
        ("--opt adamw", 1e-4),
        ("--opt adagrad --weights none", 1e-2),
        ("--lr 0.77 --opt adam --trainable head", 0.77),
    ],
)
def test_automatic_lr(options: str, lr: float) -> None:
    """By optimizer and by what learns; a typed value always wins."""
    cfg = config_of("nowhere", "--model", "resnet18", *options.split())
    planned, reasons = plan_optimizer(cfg, empty(ARCHITECTURE), 32)
    assert planned.lr == planned.base_lr == pytest.approx(lr)
    assert any(line.startswith("lr ") for line in reasons) is ("--lr" not in options)


@pytest.mark.parametrize("has_one", [True, False])
def test_adagrad_is_fused_where_torch_has_that(has_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 refuses it for CUDA; the host then asks whether a gradient is finite, and skips the step as well."""
    monkeypatch.setattr(optim, "has_fused_adagrad", lambda device: has_one)
    parameter = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [parameter], "lr": 0.1, "base_lr": 0.1, "weight_decay": 0.0}]
    optimizer = optim.build_optimizer(groups, planned_optimizer("adagrad"))
    assert bool(optimizer.defaults["fused"]) is has_one
    for bad, moved in ((1.0, 0.0), (0.0, 0.1)):
        parameter.grad = torch.ones(2)
        optim.step_if_finite(optimizer, torch.tensor(bad))
        torch.testing.assert_close(parameter.detach(), torch.full((2,), 1 - moved))


def test_this_torch_has_fused_adagrad_for_cpus() -> None:
    assert optim.has_fused_adagrad("cpu")
