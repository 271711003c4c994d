"""Convert a PyTorch network to the bytes of an .onnx file with classes, preprocessing and hashes in its metadata."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from export.predict import DIGEST, METADATA, Preprocessing, canonical_json, digest_of, open_session, self_test_pixels
from resnet_dist.evaluation.calibrate import Calibration
from resnet_dist.model.checkpoint import Description
from resnet_dist.model.parts import cut
from resnet_dist.model.weights import sha256_of

OPSET, IR_VERSION = 18, 8  # onnxruntime 1.15 and later can load these
IR_VERSIONS = {OPSET: IR_VERSION, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
FORMAT_VERSION = 1
_PLACEHOLDER = hashlib.sha256(b"the digest goes here").hexdigest()


class WithFeatures(nn.Module):
    """The network with its features (the input of the head) as a second output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = cut(model, "head")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (B, 3, H, W) to logits (B, classes) and features (B, F)."""
        features = self.backbone(x)
        return self.head(features), features


class FromPixels(nn.Module):
    """The network with normalisation before it, and after it a softmax of the logits divided by a temperature."""

    def __init__(self, model: nn.Module, spec: Preprocessing, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.mean = nn.Buffer(torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(spec.std).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 (B, H, W, 3) to logits and probabilities (B, classes); features (B, F) if the network gives any."""
        # Without contiguous() the exporter writes nine nodes that compute shapes.
        x = image.permute(0, 3, 1, 2).contiguous().to(torch.float32)
        outputs = self.model((x / 255 - self.mean) / self.std)
        logits, *features = outputs if isinstance(outputs, tuple) else (outputs,)
        scaled = logits if self.temperature == 1 else logits / self.temperature
        return logits, scaled.softmax(1), *features


def graph_of(
    model: nn.Module,
    spec: Preprocessing,
    in_graph: bool,
    temperature: float = 1.0,
    embeddings: bool = False,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """Export the network to an ONNX graph with a dynamic axis `batch` and BatchNorm folded into the convolutions.

    The input is float32 `pixel_values` (batch, 3, H, W) and the output `logits`. With `in_graph`, the input is uint8
    `image` (batch, H, W, 3), and the output `probabilities` is added: the softmax of the logits divided by
    `temperature`. With `embeddings`, the output `features` (the input of the head) is added. The graph contains no path
    of this machine.
    """
    model = model.eval().float().cpu().to(memory_format=torch.contiguous_format)
    size = spec.img_size
    network: nn.Module = WithFeatures(model).eval() if embeddings else model
    names = ("pixel_values", ["logits"])
    example = torch.zeros(2, 3, size, size)
    if in_graph:
        network = FromPixels(network, spec, temperature).eval()
        example, names = torch.zeros(2, size, size, 3, dtype=torch.uint8), ("image", ["logits", "probabilities"])
    if embeddings:
        names[1].append("features")
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=opset,
        external_data=False,
        optimize=True,
        input_names=[names[0]],
        output_names=names[1],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    return cleaned(program.model_proto)


def cleaned(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the exporter's notes about this machine, unused operator sets and outdated shapes from the graph."""
    parts = (graph.graph.node, graph.graph.initializer, graph.graph.input, graph.graph.output)
    for item in (item for part in parts for item in part):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.graph.ClearField("metadata_props")
    graph.graph.ClearField("doc_string")
    graph.graph.ClearField("value_info")
    used = {node.domain for node in graph.graph.node}
    opsets = [entry for entry in graph.opset_import if entry.domain in used]
    graph.ClearField("opset_import")
    graph.opset_import.extend(opsets)
    graph.ClearField("metadata_props")
    graph.ir_version = IR_VERSIONS[next(entry.version for entry in opsets if entry.domain == "")]
    graph.producer_name, graph.producer_version = "resnet-dist", version("resnet-dist")
    return graph


def describe(
    description: Description,
    checkpoint: Path,
    precision: str,
    in_graph: bool,
    self_test: np.ndarray,
    calibration: Calibration | None,
    verified_with: Sequence[str] = ("cpu",),
) -> dict[str, Any]:
    """The metadata of the file: everything that is needed to use it, and its origin.

    `verified_with` names the providers of the gate. It is written before the gate, so that the bytes that pass are the
    bytes that are kept; a file that fails with one of them is removed.
    """
    thresholds = {"thresholds": list(calibration.thresholds)} if calibration and calibration.thresholds else {}
    return {
        "format_version": FORMAT_VERSION,
        **description.architecture.to_dict(),
        "classes": list(description.classes),
        "preprocessing": description.preprocessing.to_dict(),
        "input": "image" if in_graph else "pixel_values",
        "precision": precision,
        "temperature": calibration.temperature if calibration else 1.0,
        **thresholds,
        "score": dict(description.score),
        "epoch": description.epoch,
        "weights_kind": description.weights_kind,
        "checkpoint_sha256": sha256_of(checkpoint),
        **({"origin": dict(description.origin)} if description.origin else {}),
        "self_test": [float(value) for value in self_test],
        "verified_with": list(verified_with),
        "versions": {name: version(name) for name in ("resnet-dist", "torch", "onnx", "onnxruntime")},
    }


def finished(graph: onnx.ModelProto, metadata: Mapping[str, Any]) -> bytes:
    """The bytes of the file: the graph with its metadata, which includes the sha256 of everything else."""
    # Image.NominalPixelRange (onnx/docs/MetadataProps.md) has no value for an input that is normalised by mean and
    # standard deviation, so only a graph with uint8 input has the property.
    properties = {METADATA: canonical_json(metadata), DIGEST: _PLACEHOLDER}
    properties |= {"Image.BitmapPixelFormat": "Rgb8", "Image.ColorSpaceGamma": "SRGB"}
    if metadata["input"] == "image":
        properties["Image.NominalPixelRange"] = "NominalRange_0_255"
    onnx.helper.set_model_props(graph, properties)
    onnx.checker.check_model(graph, full_check=True)
    data = graph.SerializeToString(deterministic=True)
    digest = digest_of(data, _PLACEHOLDER)
    return bytes(data.replace(_PLACEHOLDER.encode(), digest.encode()))


@torch.no_grad()
def self_test_logits(model: nn.Module, spec: Preprocessing) -> np.ndarray:
    """The logits of the self-test's image in PyTorch, float32 (classes,)."""
    network = FromPixels(model.eval().float().cpu(), spec, 1.0).eval()
    logits, _ = network(torch.from_numpy(self_test_pixels(spec.img_size)))
    return np.asarray(logits[0])


def runtime_logits(graph: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logits of the inputs in onnxruntime, float32 (B, classes)."""
    session = open_session(graph.SerializeToString(), None, "cpu", "the graph")
    outputs: Sequence[np.ndarray] = session.run(["logits"], dict(feeds))
    return np.asarray(outputs[0], np.float32)
