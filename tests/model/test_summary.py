"""The numbers of `summary` are those of the real network."""

import re
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.cli.main import main
from resnet_dist.config.schema import ARCHITECTURES, ModelConfig
from resnet_dist.model.resnet import Architecture, build, empty
from resnet_dist.model.summary import Layer, summarise

SIDE = 64


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if not list(module.children())}


def total(layers: list[Layer], what: str) -> int:
    return sum(getattr(layer, what) for layer in layers)


def made(name: str, **settings: Any) -> Architecture:
    return Architecture.of(ModelConfig(model=name, **settings), 1000)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Layer]]:
    """torchvision's network with memory for its weights, and our summary of the same architecture."""
    with torch.device("meta"):
        model = getattr(torchvision.models, request.param)()
    model = model.to_empty(device="cpu").eval()
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model, summarise(empty(made(request.param)), SIDE)


def test_flops_equal_torchs_count_of_the_real_network(pair: tuple[nn.Module, list[Layer]]) -> None:
    model, layers = pair
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, SIDE, SIDE))
    assert total(layers, "flops") == counter.get_total_flops() > 0


def test_parameters_are_counted_once(pair: tuple[nn.Module, list[Layer]]) -> None:
    model, layers = pair
    assert total(layers, "parameters") == sum(p.numel() for p in model.parameters())
    assert total(layers, "trainable") == total(layers, "parameters")


def test_layers_and_shapes_equal_a_real_forward(pair: tuple[nn.Module, list[Layer]]) -> None:
    """In the order in which they run (a ReLU that runs twice comes where it runs first); without the batch."""
    model, layers = pair
    seen: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in leaves(model).items()}

    def note(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        seen[names[module]] = tuple(output.shape[1:])

    hooks = [module.register_forward_hook(note) for module in names]
    with torch.inference_mode():
        model(torch.zeros(1, 3, SIDE, SIDE))
    for hook in hooks:
        hook.remove()
    ours = {layer.name: layer.shape for layer in layers if not layer.name.startswith("fc.")}
    assert list(ours.items()) == list(seen.items())


def test_flops_of_every_layer_are_two_per_multiply_add(pair: tuple[nn.Module, list[Layer]]) -> None:
    """Convolutions and the linear layer, from their shapes; all else counts as free, as torch has it."""
    model, layers = pair
    modules = leaves(model)
    for layer in layers:
        module, expected = modules.get(layer.name), 0
        if isinstance(module, nn.Conv2d):
            expected = 2 * layer.shape[1] * layer.shape[2] * module.weight.numel()
        elif isinstance(module, nn.Linear):
            expected = 2 * module.weight.numel()
        assert layer.flops == expected, layer.name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_numbers_equal_those_published_by_torchvision(name: str) -> None:
    """Parameters, and 10^9 multiply-adds at 224 pixels to three decimals."""
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    layers = summarise(empty(made(name)), 224)
    assert total(layers, "parameters") == published["num_params"]
    assert round(total(layers, "flops") / 2e9, 3) == published["_ops"]


@pytest.mark.parametrize("settings", [{"head": "mlp"}, {"head": "concat-pool"}, {"stem": "small", "weights": "none"}])
def test_other_heads_and_stems_are_counted_too(settings: dict[str, str]) -> None:
    model = build(made("resnet18", **settings)).eval()
    layers = summarise(empty(made("resnet18", **settings)), 32)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    assert total(layers, "flops") == counter.get_total_flops()
    assert total(layers, "parameters") == sum(p.numel() for p in model.parameters())
    assert layers[-1].shape == (1000,)


@pytest.mark.parametrize("training", [True, False])
def test_summary_does_not_change_the_model(training: bool) -> None:
    """Its mode, its statistics and its hooks."""
    model = build(made("resnet18")).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summarise(model, 32)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["summary", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_verb_prints_the_published_numbers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    out = said(capsys, "--model", name)
    assert f"parameters {published['num_params']:,}, trainable {published['num_params']:,}" in out
    printed = re.search(r"forward ([0-9.]+) GFLOPs", out)
    assert printed and float(printed[1]) == pytest.approx(2 * published["_ops"], abs=1.5e-3)


def test_verb_prints_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--model", "resnet18", "--img-size", "64", "--num-classes", "5")
    rows = [line.split() for line in out.splitlines()]
    for name in leaves(empty(Architecture.of(ModelConfig(model="resnet18"), 5))):
        assert any(name in row for row in rows), name
    assert re.search(r"\bfc\b.* 5 .*2,565", out)


@pytest.mark.parametrize(
    ("arguments", "learning", "updating"),
    [
        (["--trainable", "head"], 512 * 1000 + 1000, 0),
        (["--trainable", "head", "--batch-norm-stats", "update"], 512 * 1000 + 1000, 20),
        (["--recipe", "feature-extractor"], 512 * 1000 + 1000, 20),
        (["--recipe", "bn-only"], 512 * 1000 + 1000 + 9600, 20),
        (["--recipe", "discriminative-bn-frozen", "--phase-number", "2"], 11_689_512 - 9600, 0),
        (["--recipe", "gradual-unfreeze", "--phase-number", "2"], 8_393_728 + 513_000, 5),
    ],
)
def test_verb_prints_what_learns(
    arguments: list[str], learning: int, updating: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """resnet18 has 9,600 weights and biases in 20 BatchNorm layers, and 8,393,728 parameters in layer4."""
    out = said(capsys, "--model", "resnet18", *arguments)
    assert f"trainable {learning:,} " in out
    assert f"BatchNorm statistics update in {updating} layers" in out
