"""The networks are torchvision's, whatever our heads and stems add."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from resnet_dist.config.schema import ARCHITECTURES, STAGES, ModelConfig
from resnet_dist.model.resnet import Architecture, build, empty, stage_of

CLASSES = 7
NetworkMaker = Callable[..., nn.Module]


def architecture(name: str, head: str = "linear", stem: str = "standard", classes: int = CLASSES) -> Architecture:
    hidden = () if head == "linear" else (24, 12)
    return Architecture(name=name, stem=stem, head=head, head_hidden=hidden, dropout=0.5, num_classes=classes)


def randomise_statistics(model: nn.Module) -> None:
    """Running statistics as training leaves them; those of a new network would hide a mix-up."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(3)


def theirs(library: str, name: str, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network of torchvision or timm that holds these very tensors, strictly loaded."""
    make: NetworkMaker = getattr(torchvision.models, name) if library == "torchvision" else timm_model(name)
    with torch.device("meta"):
        model = make(num_classes=CLASSES)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def timm_model(name: str) -> NetworkMaker:
    return lambda num_classes: timm.create_model(name, num_classes=num_classes)


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.fixture(scope="module", params=["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """All kinds of block, with the linear head and the standard stem, as if trained; not to be changed by a test."""
    torch.manual_seed(0)
    model = build(architecture(request.param))
    randomise_statistics(model)
    return request.param, model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_have_torchvisions_names_and_shapes(name: str) -> None:
    model = empty(architecture(name))
    with torch.device("meta"):
        plain = getattr(torchvision.models, name)(num_classes=CLASSES)
    assert list(shapes(model.state_dict()).items()) == list(shapes(plain.state_dict()).items())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_other_libraries_load_it_and_agree(network: tuple[str, nn.Module], library: str) -> None:
    """Strictly, and with equal logits."""
    name, model = network
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(library, name, model.state_dict()).eval()(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert expected.std() > 0


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_state_dicts_of_other_libraries_load_strictly(network: tuple[str, nn.Module], library: str) -> None:
    name, model = network
    tensors = theirs(library, name, model.state_dict()).state_dict()
    back = empty(architecture(name))
    back.load_state_dict(tensors, strict=True, assign=True)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_empty_network_takes_no_memory(name: str) -> None:
    model = empty(architecture(name, "concat-pool", "small"))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("stem", ["standard", "small"])
@pytest.mark.parametrize("head", ["linear", "mlp", "concat-pool"])
def test_empty_network_has_the_names_and_shapes_of_the_real_one(stem: str, head: str) -> None:
    made = architecture("resnet18", head, stem)
    assert shapes(empty(made).state_dict()) == shapes(build(made).state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_small_stem_keeps_32_pixels_until_layer2(name: str) -> None:
    """Feature maps of 32, 16, 8 and 4 pixels: the ResNet that is usual for CIFAR."""
    model = empty(architecture(name, stem="small"))
    seen: dict[str, tuple[int, ...]] = {}
    for stage in STAGES[1:5]:
        module = getattr(model, stage)
        module.register_forward_hook(lambda _, __, output, stage=stage: seen.update({stage: tuple(output.shape)}))
    logits = model(torch.empty(2, 3, 32, 32, device="meta"))
    wide = 1 if name in ("resnet18", "resnet34") else 4
    assert seen == {f"layer{i + 1}": (2, 64 * 2**i * wide, 32 // 2**i, 32 // 2**i) for i in range(4)}
    assert logits.shape == (2, CLASSES)


def test_small_stem_is_initialised_like_torchvisions_convolutions() -> None:
    """He et al.'s initialisation over the fan-out: a standard deviation of sqrt(2 / (64 * 9))."""
    model = build(architecture("resnet18", stem="small"))
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert isinstance(model.maxpool, nn.Identity)


@pytest.mark.parametrize(("name", "head"), [("resnet18", "mlp"), ("resnet50", "concat-pool")])
def test_other_heads_get_torchvisions_features(name: str, head: str) -> None:
    """Average pooling for the mlp; average and maximum for the deeper head."""
    torch.manual_seed(0)
    model = build(architecture(name, head)).eval()
    plain = getattr(torchvision.models, name)()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("fc.")}, strict=False)
    maps = nn.Sequential(*list(plain.eval().children())[:-2])
    with torch.inference_mode():
        features = maps(images := torch.randn(3, 3, 64, 64))
        pooled = [features.mean((2, 3)), features.amax((2, 3))]
        expected = model.fc(torch.cat(pooled, 1) if head == "concat-pool" else pooled[0])
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert expected.shape == (3, CLASSES)


@pytest.mark.parametrize("name", ["resnet34", "resnet101"])
@pytest.mark.parametrize("head", ["mlp", "concat-pool"])
def test_every_head_gives_logits_on_every_kind_of_block(name: str, head: str) -> None:
    model = empty(architecture(name, head, classes=11))
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 11)


@pytest.mark.parametrize("head", ["linear", "mlp", "concat-pool"])
def test_every_parameter_belongs_to_a_stage(head: str) -> None:
    names = [name for name, _ in empty(architecture("resnet50", head)).named_parameters()]
    assert {stage_of(name) for name in names} == set(STAGES)
    assert {name.split(".")[0] for name in names if stage_of(name) == "stem"} == {"conv1", "bn1"}
    assert {name.split(".")[0] for name in names if stage_of(name) == "head"} == {"fc"}


def test_linear_head_has_no_hidden_widths() -> None:
    """Else two equal networks would be told apart."""
    assert Architecture.of(ModelConfig(head="linear", head_hidden=(9,)), 3).head_hidden == ()
    assert Architecture.of(ModelConfig(head="mlp", head_hidden=(9,)), 3).head_hidden == (9,)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("head", ["linear", "mlp", "concat-pool"])
@pytest.mark.parametrize("stem", ["standard", "small"])
def test_architecture_survives_json(name: str, head: str, stem: str) -> None:
    made = architecture(name, head, stem)
    assert Architecture.from_dict(json.loads(json.dumps(made.to_dict())), CLASSES) == made


HEAD: dict[str, Any] = {"name": "mlp", "hidden": [8], "dropout": 0.0}
GOOD: dict[str, Any] = {"architecture": "resnet18", "stem": "standard", "head": HEAD}


@pytest.mark.parametrize(
    "changed",
    [
        {"architecture": "resnet19"},
        {"architecture": "alexnet"},
        {"architecture": None},
        {"architecture": ["resnet18"]},
        {"architecture": {}},
        {"stem": "large"},
        {"stem": 3},
        {"head": None},
        {"head": "mlp"},
        {"head": {}},
        {"head": HEAD | {"name": "transformer"}},
        {"head": HEAD | {"name": ["mlp"]}},
        {"head": HEAD | {"hidden": None}},
        {"head": HEAD | {"hidden": 8}},
        {"head": HEAD | {"hidden": "8"}},
        {"head": HEAD | {"hidden": [0]}},
        {"head": HEAD | {"hidden": [-5]}},
        {"head": HEAD | {"hidden": [8.0]}},
        {"head": HEAD | {"hidden": [True]}},
        {"head": HEAD | {"hidden": [10**12]}},
        {"head": HEAD | {"hidden": [8] * 1000}},
        {"head": HEAD | {"dropout": 1.0}},
        {"head": HEAD | {"dropout": -0.1}},
        {"head": HEAD | {"dropout": float("nan")}},
        {"head": HEAD | {"dropout": "0.5"}},
        {"head": HEAD | {"dropout": None}},
    ],
    ids=str,
)
def test_architecture_that_cannot_be_built_is_refused(changed: dict[str, Any]) -> None:
    """A checkpoint comes from anywhere: its description is checked before anything is made of it."""
    assert Architecture.from_dict(GOOD, 2).head_hidden == (8,)
    with pytest.raises(ValueError):
        Architecture.from_dict(GOOD | changed, 2)


@pytest.mark.parametrize("missing", ["architecture", "stem", "head"])
def test_incomplete_architecture_is_refused(missing: str) -> None:
    with pytest.raises(ValueError):
        Architecture.from_dict({key: value for key, value in GOOD.items() if key != missing}, 2)


def test_weights_are_channels_last() -> None:
    model = build(architecture("resnet18"))
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
