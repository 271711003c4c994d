"""A network cut in two gives what it gave whole, and the first part is really the one that does not change."""

import pytest
import torch

from resnet_dist.config.schema import ModelConfig, Phase
from resnet_dist.model.parts import cut, first_changing_stage
from resnet_dist.model.resnet import Architecture, build, empty, stage_of
from resnet_dist.model.trainable import select, set_trainable, train_mode, updating_batch_norms


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
@pytest.mark.parametrize("head", ["linear", "concat-pool"])
def test_both_parts_together_equal_the_network(name: str, head: str) -> None:
    torch.manual_seed(0)
    stem = "small" if head == "concat-pool" else "standard"
    model = build(Architecture.of(ModelConfig(model=name, head=head, stem=stem, weights="none"), 3)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole = model(images)
        for stage in ("layer1", "layer2", "layer3", "layer4", "head"):
            prefix, rest = cut(model, stage)
            assert torch.equal(rest(prefix(images)), whole), stage
            ids = {id(parameter) for part in (prefix, rest) for parameter in part.parameters()}
            assert ids == {id(parameter) for parameter in model.parameters()}


def stage_of_phase(model: torch.nn.Module, phase: Phase) -> str:
    return first_changing_stage(select(model, phase.trainable), updating_batch_norms(model, phase))


@pytest.mark.parametrize(
    ("phase", "stage"),
    [
        (Phase(trainable="head"), "head"),
        (Phase(trainable="head", batch_norm_stats="update"), "stem"),
        (Phase(trainable="head layer4"), "layer4"),
        (Phase(trainable="layer3.1.* head", batch_norm_stats="frozen"), "layer3"),
        (Phase(trainable="head batchnorm"), "stem"),
        (Phase(trainable="all -batchnorm", batch_norm_stats="frozen"), "stem"),
    ],
)
def test_first_changing_stage(phase: Phase, stage: str) -> None:
    assert stage_of_phase(empty(Architecture.of(ModelConfig(weights="none"), 2)), phase) == stage


@pytest.mark.parametrize("trainable", ["head", "layer4 head", "layer2 layer3 layer4 head"])
def test_stages_before_it_do_not_change_and_save_nothing_for_backward(trainable: str) -> None:
    """Brute force: a real step, all tensors before and after; and the memory that autograd holds on to."""
    torch.manual_seed(0)
    model = build(Architecture.of(ModelConfig(model="resnet18", weights="none"), 2))
    phase = Phase(trainable=trainable)
    set_trainable(model, select(model, phase.trainable))
    train_mode(model, updating_batch_norms(model, phase))
    prefix, rest = cut(model, stage_of_phase(model, phase))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, 64, 64)

    def kept(network: torch.nn.Module, inputs: torch.Tensor) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            network(inputs).sum().backward()
        return sum(sizes)

    whole = kept(model, images)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    stages = {stage_of(name) for name in (*changed, *(n for n, p in model.named_parameters() if p.grad is not None))}
    assert stages == set(trainable.split())
    with torch.no_grad():
        features = prefix(images)
    assert kept(rest, features) == whole
