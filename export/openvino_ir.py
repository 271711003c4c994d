"""OpenVINO's own format, IR, of the float32 network, and a predictor that runs it as OpenVINO does."""

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from export.predict import Predictor
from resnet_dist.errors import UsageError

FILE = "model.openvino.xml"  # of the export; the weights are in model.openvino.bin next to it
# By default OpenVINO computes in bfloat16 on CPUs that can: too coarse for logits within 1e-4 of PyTorch's.
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


def check_installed() -> None:
    """Raises UsageError if openvino is missing."""
    if importlib.util.find_spec("openvino") is None:
        raise UsageError("--openvino needs openvino: pip install 'resnet-dist[openvino]'")


def write_ir(model: Path, file: Path) -> str:
    """Convert an .onnx file to `file` (.xml) and its weights (.bin), in float32. Returns a line for the user.

    The metadata of the .onnx file are kept, in the section `framework` of the runtime information.
    """
    import openvino

    # Not openvino.convert_model: it can send usage statistics.
    openvino.save_model(openvino.Core().read_model(model), file, compress_to_fp16=False)
    return f"openvino {version('openvino')} on the CPU ({', '.join(f'{k}={v}' for k, v in SETTINGS.items())})"


def parts(file: Path) -> list[Path]:
    """A model file and, of an IR, also its weights."""
    return [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]


class OpenVinoPredictor(Predictor):
    """The predictor of the model.onnx next to an IR, with OpenVINO on the CPU and the IR instead of onnxruntime."""

    def __init__(self, file: Path, threads: int) -> None:
        super().__init__(file.with_name("model.onnx"), threads, "cpu")
        self._session = _Session(file, threads)
        self.provider, self.providers = "openvino", ["OpenVINO"]


class _Session:
    """An IR with the method of an onnxruntime session that `Predictor` calls."""

    def __init__(self, file: Path, threads: int) -> None:
        import openvino

        self._model = openvino.Core().compile_model(file, "CPU", {**SETTINGS, "INFERENCE_NUM_THREADS": threads})

    def run(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs with these names."""
        outputs = self._model(feed)
        return [outputs[name] for name in names]
