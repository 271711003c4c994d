"""The model repository for Triton, read with Triton's own schema and compared with what onnxruntime finds."""

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from export.bundle import keep_others
from export.triton import write_triton
from resnet_dist.cli.main import main

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient")
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(uint8)": "TYPE_UINT8"}


@pytest.fixture(scope="module", params=["float input", "bytes as input"])
def export(request: pytest.FixtureRequest, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with its repository: by the command, and from an export that was made without."""
    out = tmp_path_factory.mktemp("triton") / "export"
    if request.param == "float input":
        out.mkdir()
        bundle = request.getfixturevalue("bundle")
        for name in ("model.onnx", "labels.txt"):
            shutil.copyfile(bundle / name, out / name)
        write_triton(out, "resnet18")
    else:
        words = ["export", str(small_run), "-o", str(out), "--triton", "--images", "4", "--threads", "1"]
        assert main([*words, "--preprocess-in-graph", "--embeddings"]) == 0
    return out


def test_repository_has_one_model(export: Path) -> None:
    files = {str(file.relative_to(export / "triton")) for file in (export / "triton").rglob("*") if file.is_file()}
    assert files == {"resnet18/config.pbtxt", "resnet18/labels.txt", "resnet18/1/model.onnx"}
    assert (export / "triton/resnet18/1/model.onnx").read_bytes() == (export / "model.onnx").read_bytes()


def test_files_of_others_stay_when_an_export_is_replaced(export: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(export, old)
    mine = [f"triton/{name}" for name in ("mine.txt", "resnet18/mine.txt", "resnet18/1/mine.txt", "mine/1/model.py")]
    for name in mine:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).touch()
    new.mkdir()
    keep_others(old, new)
    assert {str(file.relative_to(new)) for file in new.rglob("*") if file.is_file()} == set(mine)


def test_configuration_describes_the_model(export: Path) -> None:
    folder = export / "triton" / "resnet18"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend) == (folder.name, "onnxruntime")
    assert config.HasField("dynamic_batching")
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    kinds = model_config_pb2.DataType.Name
    for described, tensors in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(one.name, kinds(one.data_type), list(one.dims)) for one in described] == [
            (one.name, TYPES[one.type], one.shape[1:]) for one in tensors
        ]
    (given,) = config.input
    dtype = np.uint8 if kinds(given.data_type) == "TYPE_UINT8" else np.float32
    logits = session.run(["logits"], {given.name: np.zeros((config.max_batch_size, *given.dims), dtype)})[0]
    labels = (folder / "labels.txt").read_text().splitlines()
    assert logits.shape == (config.max_batch_size, len(labels))
    for output in config.output:
        assert output.label_filename == ("" if output.name == "features" else "labels.txt")


def test_a_field_that_triton_lacks_would_be_noticed() -> None:
    with pytest.raises(text_format.ParseError):
        text_format.Parse("max_batch: 16", model_config_pb2.ModelConfig())


def test_names_are_quoted(export: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "labels.txt"):
        (tmp_path / name).write_bytes((export / name).read_bytes())
    write_triton(tmp_path, 'a "b')
    text = (tmp_path / 'triton/a "b/config.pbtxt').read_text()
    assert text_format.Parse(text, model_config_pb2.ModelConfig()).name == 'a "b'
