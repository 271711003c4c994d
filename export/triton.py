"""Write a model repository for NVIDIA's Triton Inference Server."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ValueInfoProto

FOLDER = "triton"  # of the export
MAX_BATCH = 16
KINDS = {"FLOAT": "TYPE_FP32", "UINT8": "TYPE_UINT8"}  # ONNX's names and Triton's
LABELLED = ("logits", "probabilities")  # outputs with one value per class: Triton can answer with labels


def write_triton(export: Path, architecture: str) -> None:
    """Write the folder `triton` of an export: one model, named after its architecture, with its labels.

    `export` holds model.onnx and labels.txt.
    """
    import onnx

    model = export / FOLDER / architecture
    (model / "1").mkdir(parents=True)
    shutil.copyfile(export / "model.onnx", model / "1" / "model.onnx")
    shutil.copyfile(export / "labels.txt", model / "labels.txt")
    graph = onnx.load(export / "model.onnx").graph
    (model / "config.pbtxt").write_text("\n".join(_config(architecture, graph)) + "\n")


def _config(name: str, graph: Any) -> Iterator[str]:
    """The lines of config.pbtxt, a text of Triton's protobuf message ModelConfig."""
    yield f"name: {json.dumps(name)}"
    yield 'backend: "onnxruntime"'
    yield f"max_batch_size: {MAX_BATCH}"
    yield from _tensors("input", graph.input)
    yield from _tensors("output", graph.output)
    yield "dynamic_batching { }  # images of different requests share a batch while the model is busy"


def _tensors(role: str, values: "Iterable[ValueInfoProto]") -> Iterator[str]:
    """One message per tensor; the batch dimension, which is the first, is left out."""
    from onnx import TensorProto

    for value in values:
        tensor = value.type.tensor_type
        yield f"{role} {{"
        yield f"  name: {json.dumps(value.name)}"
        yield f"  data_type: {KINDS[TensorProto.DataType.Name(tensor.elem_type)]}"
        yield f"  dims: [ {', '.join(str(dim.dim_value) for dim in list(tensor.shape.dim)[1:])} ]"
        if value.name in LABELLED:
            yield '  label_filename: "labels.txt"'
        yield "}"
