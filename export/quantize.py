"""Convert the float32 graph to float16, or to int8 with ranges calibrated on images."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.quantization.registry import QDQRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export.calibration import BATCH, METHODS, Measured, attribute, session_of
from export.rounding import rounded_weights
from export.to_onnx import cleaned

SAFE_WEIGHT = 64  # 255 * (64 + 64) < 2**15 <= 255 * (65 + 64)
LARGEST_WEIGHT = 127
AROUND = ("Transpose", "Cast", "Sub", "Div", "Softmax")  # operations that FromPixels adds before and after the network
ENOUGH_AGREEMENT = 0.99  # layers are left in float until int8 agrees with float32 on this share of the images ...
FLOAT_SHARE = 0.2  # ... or this share of them is in float


@dataclass(frozen=True)
class Choice:
    """How an int8 graph was made, and how it agrees with float32 on the `images` that chose between the ways.

    Attributes:
        calibration: "minmax", "percentile" or "entropy".
        float_layers: layers that are left in float, the most sensitive first.
        layers: the number of all layers.
        images: the number of training images that chose.
        agreement: the share of them with the same top-1 as float32, in 0..1.
        tried: the agreement of every method of calibration without layers in float.
    """

    calibration: str
    float_layers: tuple[str, ...]
    layers: int
    images: int
    agreement: float
    tried: dict[str, float]

    def __str__(self) -> str:
        left = f"{', '.join(self.float_layers) or 'none'} of {self.layers}"
        same = f"{round(self.agreement * self.images)} of {self.images}"
        return f"{self.calibration} calibration, layers in float: {left}; same top-1 as fp32 on {same} training images"


def to_fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Convert the weights and activations to float16. Inputs and outputs stay float32 (or uint8)."""
    copy = onnx.ModelProto.FromString(graph.SerializeToString())
    blocked = [node.name for node in copy.graph.node if node.op_type in AROUND]
    converted = convert_float_to_float16(copy, keep_io_types=True, node_block_list=blocked, disable_shape_infer=False)
    wrapped = OnnxModel(converted)
    wrapped.topological_sort()  # the conversion appends the casts of the inputs at the end
    return cleaned(wrapped.model)


def to_int8(
    graph: onnx.ModelProto, inputs: Sequence[np.ndarray], reduce_range: bool = True
) -> tuple[onnx.ModelProto, Choice]:
    """Quantize the graph to int8 in QDQ form, in the way that agrees best with float32. Returns also how.

    `inputs` are single images in the form that the graph takes. On every other one, the ranges of the activations are
    measured, and inputs of each layer, for which its weights are rounded. The others choose the method of calibration.
    Then the most sensitive layers are left in float, one by one, until the same top-1 is given on ENOUGH_AGREEMENT of
    them or FLOAT_SHARE of the layers are in float.

    Weights are signed and per channel. Activations are unsigned: with signed activations, onnxruntime on x86 computes
    half of the convolutions in float.

    On x86 CPUs without VNNI, onnxruntime adds two neighbouring products of such bytes in 16 bits, and a sum that does
    not fit is clamped (saturates). `reduce_range` limits weights to -64..64 (7 bits), so every sum fits and the file
    gives the same results on every CPU. Without it, see `may_saturate`.
    """
    network = Network(graph, inputs[::2], reduce_range)
    choosing = np.stack(inputs[1::2] or inputs)
    expected = logits_of(graph, choosing)
    tried = {method: network.quantized(method, ()) for method in METHODS}
    scores = {method: agreement(expected, logits_of(one, choosing)) for method, one in tried.items()}
    method = max(METHODS, key=lambda name: scores[name])
    best, score, left = tried[method], scores[method], 0
    budget = int(FLOAT_SHARE * len(network.layers))
    order = network.most_sensitive(method, choosing, budget) if score[0] < ENOUGH_AGREEMENT else []
    for count in range(1, len(order) + 1):
        other = network.quantized(method, order[:count])
        found = agreement(expected, logits_of(other, choosing))
        if found > score:
            best, score, left = other, found, count
        if score[0] >= ENOUGH_AGREEMENT:
            break
    names = tuple(network.label(name) for name in order[:left])
    shares = {name: share for name, (share, _) in scores.items()}
    return cleaned(best), Choice(method, names, len(network.layers), len(choosing), score[0], shares)


class Network:
    """A float32 graph that can be quantized in several ways from what was measured once on `inputs`.

    `layers` are the names of the nodes that have weights.
    """

    def __init__(self, graph: onnx.ModelProto, inputs: Sequence[np.ndarray], reduce_range: bool) -> None:
        self._reduce_range = reduce_range
        with tempfile.TemporaryDirectory(prefix="resnet-dist-int8-") as folder:
            plain, prepared = (Path(folder) / f"{step}.onnx" for step in ("plain", "prepared"))
            onnx.save(graph, plain)
            quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
            self._graph = load_model_with_shape_infer(prepared)
        self._measured = Measured(self._graph, inputs)
        self._ranges = {method: self._measured.ranges(method) for method in METHODS}
        self._weights = {tensor.name: tensor for tensor in self._graph.graph.initializer}
        self._rounded = {node.name: self._round(node) for node in self._measured.layers}
        self.layers = list(self._rounded)

    def most_sensitive(self, method: str, inputs: np.ndarray, count: int) -> list[str]:
        """The `count` layers that change the logits of the inputs most if they alone are in int8, the worst first."""
        some = inputs[:: max(1, len(inputs) // BATCH)][:BATCH]
        expected = logits_of(self._graph, some)
        found = {}
        for layer in self.layers:
            alone = self.quantized(method, [name for name in self.layers if name != layer], [layer])
            found[layer] = np.square(logits_of(alone, some) - expected).mean()
        return sorted(found, key=lambda name: -found[name])[:count]

    def label(self, node: str) -> str:
        """The layer's name in torchvision, of the name of its node."""
        (found,) = (layer for layer in self._measured.layers if layer.name == node)
        return str(found.input[1]).removesuffix(".weight").removeprefix("model.").removeprefix("backbone.")

    def quantized(self, method: str, float_nodes: Sequence[str], only: Sequence[str] = ()) -> onnx.ModelProto:
        """The graph in QDQ form with the ranges of that method; these layers stay in float (all nodes but `only`)."""
        graph = copy.deepcopy(self._graph)
        weights = {tensor.name: tensor for tensor in graph.graph.initializer}
        for node in self._measured.layers:
            if node.name not in float_nodes:
                name = node.input[1]
                weights[name].CopyFrom(onnx.numpy_helper.from_array(self._rounded[node.name], name))
        around = [node.name for node in graph.graph.node if node.op_type in AROUND]
        quantizer = QDQQuantizer(
            graph,
            per_channel=True,
            reduce_range=self._reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges[method],
            nodes_to_quantize=list(only),
            nodes_to_exclude=[*around, *float_nodes],
            op_types_to_quantize=list(QDQRegistry),
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()  # onnxruntime does not need it, the checker of onnx does
        result: onnx.ModelProto = quantizer.model.model
        return result

    def _round(self, node: onnx.NodeProto) -> np.ndarray:
        weights = torch.from_numpy(onnx.numpy_helper.to_array(self._weights[node.input[1]]).copy())
        rows, (groups,) = self._measured.rows[node.name], attribute(node, "group", [1])
        return rounded_weights(weights, rows, groups, SAFE_WEIGHT if self._reduce_range else LARGEST_WEIGHT).numpy()


def logits_of(graph: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    """The logits of the inputs in onnxruntime, float32 (N, classes)."""
    session = session_of(graph)
    name = session.get_inputs()[0].name
    batches = (inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH))
    return np.concatenate([session.run(["logits"], {name: batch})[0] for batch in batches])


def agreement(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """The share of rows with the same largest logit, and, to decide between equals, minus the mean squared error."""
    return float((expected.argmax(1) == found.argmax(1)).mean()), -float(np.square(expected - found).mean())


def may_saturate(graph: onnx.ModelProto) -> list[str]:
    """Names of the 8-bit weights whose products with unsigned activations can saturate on x86 CPUs without VNNI."""
    weights = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    largest = {t.name: np.abs(onnx.numpy_helper.to_array(t).astype(np.int16)).max(initial=0) for t in weights}
    return [name for name, weight in largest.items() if weight > SAFE_WEIGHT]
