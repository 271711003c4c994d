"""Convert the float32 graph to float16, or to int8 with ranges calibrated on images."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export.to_onnx import cleaned

SAFE_WEIGHT = 64  # 255 * (64 + 64) < 2**15 <= 255 * (65 + 64)
AROUND = ("Transpose", "Cast", "Sub", "Div", "Softmax")  # operations that FromPixels adds before and after the network


class Images(CalibrationDataReader):  # type: ignore[misc]
    """Inputs for onnxruntime's calibration, in batches of one image."""

    def __init__(self, name: str, inputs: Sequence[np.ndarray]) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter([{name: row[None]} for row in inputs])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None at the end."""
        return next(self._feeds, None)


def to_fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Convert the weights and activations to float16. Inputs and outputs stay float32 (or uint8)."""
    copy = onnx.ModelProto.FromString(graph.SerializeToString())
    blocked = [node.name for node in copy.graph.node if node.op_type in AROUND]
    converted = convert_float_to_float16(copy, keep_io_types=True, node_block_list=blocked, disable_shape_infer=False)
    wrapped = OnnxModel(converted)
    wrapped.topological_sort()  # the conversion appends the casts of the inputs at the end
    return cleaned(wrapped.model)


def to_int8(graph: onnx.ModelProto, inputs: Sequence[np.ndarray], reduce_range: bool = True) -> onnx.ModelProto:
    """Quantize the graph to int8 in QDQ form.

    Weights are signed and per channel. Activations are unsigned: with signed activations, onnxruntime on x86 computes
    half of the convolutions in float. The ranges are measured on `inputs`, which are single images in the form that the
    graph takes.

    On x86 CPUs without VNNI, onnxruntime adds two neighbouring products of such bytes in 16 bits, and a sum that does
    not fit is clamped (saturates). `reduce_range` limits weights to -64..64 (7 bits), so every sum fits and the file
    gives the same results on every CPU. Without it, see `may_saturate`.
    """
    name = graph.graph.input[0].name
    excluded = [node.name for node in graph.graph.node if node.op_type in AROUND]
    with tempfile.TemporaryDirectory(prefix="resnet-dist-int8-") as folder:
        plain, prepared, quantized = (Path(folder) / f"{step}.onnx" for step in ("plain", "prepared", "quantized"))
        onnx.save(graph, plain)
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            Images(name, inputs),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=excluded,
        )
        return cleaned(onnx.load(quantized))


def may_saturate(graph: onnx.ModelProto) -> list[str]:
    """Names of the 8-bit weights whose products with unsigned activations can saturate on x86 CPUs without VNNI."""
    weights = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    largest = {t.name: np.abs(onnx.numpy_helper.to_array(t).astype(np.int16)).max(initial=0) for t in weights}
    return [name for name, weight in largest.items() if weight > SAFE_WEIGHT]
