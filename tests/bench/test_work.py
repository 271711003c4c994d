"""FLOPs and bytes of a training step, against torch's own counter, real backward passes and published figures."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.bench.work import Operation, bytes_moved, flops, least_seconds, operations
from resnet_dist.config.schema import STAGES, Phase
from resnet_dist.model.parts import cut
from resnet_dist.model.resnet import Architecture, build, empty
from resnet_dist.model.trainable import select, set_trainable, train_mode, updating_batch_norms


def architecture(name: str, head: str = "linear", stem: str = "standard") -> Architecture:
    return Architecture(name=name, stem=stem, head=head, head_hidden=(8,), dropout=0.1, num_classes=3)


def begin(model: nn.Module, phase: Phase) -> None:
    set_trainable(model, select(model, phase.trainable))
    train_mode(model, updating_batch_norms(model, phase))


def done_by(name: str, phase: Phase, shape: tuple[int, ...]) -> list[Operation]:
    model = empty(architecture(name))
    begin(model, phase)
    return operations(model, shape)


def counted(model: nn.Module, x: torch.Tensor) -> int:
    """What torch counts in a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("first", STAGES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_flops_equal_torchs_count(name: str, first: str) -> None:
    """For both kinds of block and every first stage that learns."""
    phase = Phase(trainable=" ".join(STAGES[STAGES.index(first) :]))
    model = empty(architecture(name))
    begin(model, phase)
    expected = counted(model, torch.empty(2, 3, 64, 64, device="meta"))
    assert flops(done_by(name, phase, (2, 3, 64, 64))) == expected > 0


@pytest.mark.parametrize("trainable", ["all", "head batchnorm", "layer4.1.* head", "all -batchnorm"])
@pytest.mark.parametrize(("head", "stem"), [("linear", "small"), ("mlp", "standard"), ("concat-pool", "standard")])
def test_flops_of_other_heads_stems_and_selections(trainable: str, head: str, stem: str) -> None:
    """On real tensors, in case the meta device were counted differently."""
    made = architecture("resnet18", head, stem)
    real, meta = build(made), empty(made)
    for model in (real, meta):
        begin(model, Phase(trainable=trainable))
    assert flops(operations(meta, (2, 3, 32, 32))) == counted(real, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("stage", ["layer4", "head"])
def test_flops_of_the_part_after_cached_features(stage: str) -> None:
    phase = Phase(trainable="layer4 head" if stage == "layer4" else "head", batch_norm_stats="frozen")
    model = empty(architecture("resnet50"))
    begin(model, phase)
    prefix, rest = cut(model, stage)
    shape = tuple(prefix(torch.empty(2, 3, 64, 64, device="meta")).shape)
    assert flops(operations(rest, shape)) == counted(rest, torch.empty(shape, device="meta"))


@pytest.mark.parametrize(
    ("name", "megabytes", "images"),
    [("resnet18", 106, 30_400), ("resnet34", 161, 17_800), ("resnet50", 477, 8_150), ("resnet101", 712, 5_200)],
)
def test_bytes_and_roofline_equal_an_independent_computation(name: str, megabytes: float, images: float) -> None:
    """bf16 at 224 pixels on 790 TFLOP/s and 4.3 TB/s; figures worked out by hand from the published layer tables."""
    done = done_by(name, Phase(), (8, 3, 224, 224))
    assert bytes_moved(done, 2) / 8 / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert 8 / least_seconds(done, 790e12, 4.3e12, 2) == pytest.approx(images, rel=0.01)


def test_bytes_of_one_layer_by_hand() -> None:
    """The stem's convolution, of an image that takes no gradient: forward and weights only, input and output each."""
    done = [o for o in done_by("resnet18", Phase(), (1, 3, 64, 64)) if o.layer == "conv1"]
    assert [o.direction for o in done] == ["forward", "to weights"]
    assert all(o.bytes(4) == 4 * (3 * 64 * 64 + 64 * 32 * 32) for o in done)
    pool = next(o for o in done_by("resnet18", Phase(), (1, 3, 64, 64)) if o.layer == "maxpool")
    assert pool.bytes(4) == 4 * (64 * 32 * 32 + 64 * 16 * 16) + 8 * (64 * 16 * 16)


def test_each_operation_is_limited_by_arithmetic_or_memory() -> None:
    done = [Operation("a", "forward", flops=100, values=1), Operation("b", "forward", flops=1, values=100)]
    assert least_seconds(done, flops_per_second=10, bytes_per_second=20, width=2) == pytest.approx(100 / 10 + 200 / 20)
