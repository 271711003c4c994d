"""The ranges of activations, and inputs of layers, measured on images in one pass through the float32 graph."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import HistogramCollector, TensorsData

METHODS = ("minmax", "percentile", "entropy")
PERCENTILE = 99.999
BINS, LEVELS = 256, 128  # of the histogram of a tensor, and of the distribution that entropy compares it with
ROWS = 2048  # inputs that are kept of a layer
BATCH = 8
LAYERS = ("Conv", "Gemm")


class Measured:
    """Histograms of all activations, and `rows`: inputs of each layer, float32 (n, K), by the name of the node.

    A row of a convolution is one position of its window: the K = channels x height x width values that meet the
    weights of one output channel, or of all groups of them.
    """

    def __init__(self, graph: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> None:
        self._follows = relu_of(graph)
        self._histograms = HistogramCollector("percentile", False, BINS, LEVELS, PERCENTILE, "same")
        self.layers = layers_of(graph)
        kept: dict[str, list[torch.Tensor]] = {node.name: [] for node in self.layers}
        chance = torch.Generator().manual_seed(0)
        for values in activations(graph, inputs):
            with contextlib.redirect_stdout(io.StringIO()):  # onnxruntime prints what it does
                self._histograms.collect({k: v for k, v in values.items() if k not in self._follows})
            for node in self.layers:
                some = rows_of(values[node.input[0]], node, ROWS * BATCH // len(inputs), graph, chance)
                kept[node.name].append(some)
        self.rows = {name: torch.cat(parts) for name, parts in kept.items()}

    def ranges(self, method: str) -> TensorsData:
        """The range of every activation: all values, most of them (PERCENTILE), or by the least relative entropy."""
        counted = self._histograms.histogram_dict
        with contextlib.redirect_stdout(io.StringIO()):
            found: Mapping[str, Sequence[np.ndarray]] = {
                "minmax": lambda: {name: values[2:4] for name, values in counted.items()},
                "percentile": self._histograms.compute_percentile,
                "entropy": self._histograms.compute_entropy,
            }[method]()
        pairs = {name: (np.float32(values[0]), np.float32(values[1])) for name, values in found.items()}
        pairs |= {name: pairs[relu] for name, relu in self._follows.items()}
        return TensorsData(CalibrationMethod.MinMax, pairs)


def layers_of(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes with weights: convolutions and matrices (output, input)."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    return [node for node in graph.graph.node if node.op_type in LAYERS and node.input[1] in weights]


def relu_of(graph: onnx.ModelProto) -> dict[str, str]:
    """tensor -> output of the ReLU that alone reads it. It needs no range of its own: values below zero are cut off."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return {name: found[0].output[0] for name, found in readers.items() if [n.op_type for n in found] == ["Relu"]}


def activations(graph: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Every float32 activation of each batch of `inputs`, by the name of its tensor; what reads the input too."""
    whole = onnx.ModelProto.FromString(graph.SerializeToString())
    known = {info.name: info for info in whole.graph.value_info}
    given, outputs = whole.graph.input[0].name, {output.name for output in whole.graph.output}
    floats = [name for name in known if known[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    whole.graph.output.extend(known[name] for name in floats if name not in outputs)
    session = session_of(whole, optimize=False)
    names = [output.name for output in session.get_outputs()]
    for start in range(0, len(inputs), BATCH):
        batch = np.stack(inputs[start : start + BATCH])
        values = dict(zip(names, session.run(names, {given: batch}), strict=True))
        yield values if batch.dtype != np.float32 else {**values, given: batch}


def session_of(graph: onnx.ModelProto, optimize: bool = True) -> onnxruntime.InferenceSession:
    """onnxruntime on the CPU with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attribute(node: onnx.NodeProto, name: str, default: list[int]) -> list[int]:
    """The integers of an attribute of a node."""
    found = [list(a.ints) or [a.i] for a in node.attribute if a.name == name]
    return found[0] if found else default


def rows_of(
    values: np.ndarray, node: onnx.NodeProto, count: int, graph: onnx.ModelProto, chance: torch.Generator
) -> torch.Tensor:
    """At most about `count` random inputs of the node, float32 (n, K), from `values` of a batch."""
    x = torch.from_numpy(values)
    if node.op_type == "Gemm":
        return x
    (weights,) = (tensor for tensor in graph.graph.initializer if tensor.name == node.input[1])
    (height, width), (down, right) = weights.dims[2:], attribute(node, "strides", [1, 1])
    top, left, bottom, after = attribute(node, "pads", [0, 0, 0, 0])
    x = torch.nn.functional.pad(x, (left, after, top, bottom))
    rows, columns = (x.shape[2] - height) // down + 1, (x.shape[3] - width) // right + 1
    positions = torch.randperm(rows * columns, generator=chance)[: max(1, count // len(x))].tolist()
    corners = [(position // columns * down, position % columns * right) for position in positions]
    return torch.cat([x[:, :, i : i + height, j : j + width].flatten(1) for i, j in corners])
