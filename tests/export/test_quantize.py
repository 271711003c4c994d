"""How int8 is made: weights rounded for their inputs, the best ranges, the most sensitive layers left in float."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from export import quantize
from export.calibration import METHODS, Measured
from export.rounding import rounded_weights

LARGEST = 64


def correlated(n: int, width: int, seed: int) -> torch.Tensor:
    """Inputs that share a few causes, as neighbouring pixels do, float32 (n, width)."""
    causes = torch.randn(12, width, generator=torch.Generator().manual_seed(99))
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=random) @ causes + 0.2 * torch.randn(n, width, generator=random)


@pytest.mark.parametrize(("width", "groups"), [(54, 1), (700, 1), (27, 4)])
def test_rounding_keeps_the_outputs_on_images_that_it_has_not_seen(width: int, groups: int) -> None:
    """Half of the error of rounding to the nearest, or less; every weight on the grid, the largest where it was."""
    weights = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    seen, others = (correlated(1000, groups * width, seed) for seed in (2, 3))
    rounded = rounded_weights(weights, seen, groups, LARGEST)
    step = weights.abs().amax(1, keepdim=True) / LARGEST
    integers = rounded / step
    assert torch.allclose(integers, integers.round(), atol=1e-3) and integers.abs().max() < LARGEST + 0.01
    assert torch.equal(rounded.abs().amax(1), weights.abs().amax(1))

    def error(w: torch.Tensor) -> float:
        parts = zip(others.chunk(groups, 1), (w - weights).chunk(groups), strict=True)
        return sum(float((x @ change.T).square().sum()) for x, change in parts)

    assert error(rounded) < 0.5 * error((weights / step).round() * step)


def test_constant_and_dead_inputs_are_rounded_too() -> None:
    weights = torch.zeros(2, 9)
    weights[0, 3] = -1.5
    assert torch.equal(rounded_weights(weights, torch.zeros(5, 9), 1, LARGEST), weights)


def network(seed: int = 0, opset: int = 18) -> onnx.ModelProto:
    """Two convolutions, a ReLU and a matrix: float32 (batch, 3, 8, 8) to 5 logits."""
    random = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, stride=2, groups=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(72, 5),
    )
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) / parameter[0].numel() ** 0.5
    program = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 3, 8, 8),),
        dynamo=True,
        opset_version=opset,
        external_data=False,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None
    return quantize.cleaned(program.model_proto)


IMAGES = list(np.random.default_rng(5).normal(size=(64, 3, 8, 8)).astype(np.float32))


def test_layers_are_left_in_float_until_the_budget_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named layers, and no others, have the float weights of the network; the rest is in int8."""
    graph = network()
    monkeypatch.setattr(quantize, "FLOAT_SHARE", 0.7)  # two of three layers
    plain, choice = quantize.to_int8(graph, IMAGES)
    assert choice.float_layers == () and choice.agreement >= quantize.ENOUGH_AGREEMENT
    assert set(choice.tried) == set(METHODS) and choice.images == 32 and choice.layers == 3
    assert choice.tried[choice.calibration] == choice.agreement == max(choice.tried.values())
    monkeypatch.setattr(quantize, "ENOUGH_AGREEMENT", 1.1)
    mixed, choice = quantize.to_int8(graph, IMAGES)
    assert 1 <= len(choice.float_layers) <= 2 and f"layers in float: {choice.float_layers[0]}" in str(choice)
    original = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    for layer in ("0", "2", "5"):
        found = {t.name: t for t in mixed.graph.initializer}.get(f"{layer}.weight")
        assert (found is not None) == (layer in choice.float_layers)
        assert found is None or np.array_equal(numpy_helper.to_array(found), original[f"{layer}.weight"])
    x = np.stack(IMAGES)
    expected = quantize.logits_of(graph, x)
    off = [np.square(quantize.logits_of(one, x) - expected).mean() for one in (plain, mixed)]
    assert off[1] < off[0]


def test_the_file_has_the_integers_that_rounding_chose() -> None:
    """onnxruntime's quantizer finds the grid again, for convolutions with and without groups and for matrices."""
    graph = network(1)
    made = quantize.Network(graph, IMAGES, True)
    stored = {t.name: numpy_helper.to_array(t) for t in made.quantized("minmax", ()).graph.initializer}
    for layer in ("0", "2", "5"):
        integers, scale = stored[f"{layer}.weight_quantized"], stored[f"{layer}.weight_scale"]
        shape = [-1] + [1] * (integers.ndim - 1)
        (rounded,) = (w for name, w in made._rounded.items() if made.label(name) == layer)
        np.testing.assert_allclose(integers * scale.reshape(shape), rounded, rtol=1e-4, atol=1e-7)


def test_ranges_are_those_of_the_activations() -> None:
    """minmax is the extent of plain torch's activations; the others lie within it."""
    graph = onnx.shape_inference.infer_shapes(network(2))
    measured = Measured(graph, IMAGES)
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.graph.initializer}
    x = torch.from_numpy(np.stack(IMAGES))
    first = torch.nn.functional.conv2d(x, weights["0.weight"], weights["0.bias"], padding=1).relu()
    (name,) = (node.output[0] for node in graph.graph.node if node.op_type == "Relu" and node.name.endswith("relu"))
    low, high = measured.ranges("minmax")[name].range_value
    assert low == pytest.approx(0) and high == pytest.approx(float(first.max()), rel=1e-5)
    for method in METHODS[1:]:
        inner = measured.ranges(method)[name].range_value
        assert low <= inner[0] < inner[1] <= high


def test_onnx_reference_reads_int8_from_opset_19_on() -> None:
    """onnx has no reference DequantizeLinear of opset 18; from 19 on it agrees with onnxruntime."""
    x = np.stack(IMAGES[:4])
    made, _ = quantize.to_int8(network(opset=19), IMAGES)
    onnx.checker.check_model(made, full_check=True)
    assert made.ir_version == 9 and [entry.version for entry in made.opset_import] == [19]
    (found,) = ReferenceEvaluator(made).run(["logits"], {"pixel_values": x})
    expected = quantize.logits_of(made, x)
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


def test_report_says_how_int8_was_made(bundle: Path) -> None:
    choice = json.loads((bundle / "export_report.json").read_text())["quantization"]
    assert choice["calibration"] in METHODS and set(choice["tried"]) == set(METHODS)
    assert choice["layers"] == 21 and choice["images"] == 36 and choice["agreement"] > 0.9
