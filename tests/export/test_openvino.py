"""`export --openvino`: the IR computes what PyTorch computes, has the metadata, and is refused like any other file."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.openvino_ir import FILE, SETTINGS, parts, write_ir
from export.predict import Predictor
from resnet_dist.cli.main import main
from resnet_dist.model.checkpoint import load_checkpoint

openvino = pytest.importorskip("openvino", reason="needs openvino")
Refused = Callable[..., str]
WORDS = ["--openvino", "--images", "6", "--threads", "1"]


@pytest.fixture(scope="module")
def export(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("openvino") / "export"
    assert main(["export", str(small_run), "-o", str(out), *WORDS, "--preprocess-in-graph", "--embeddings"]) == 0
    return out


def report_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "export_report.json").read_text())
    return values


def test_ir_computes_what_pytorch_computes(small_run: Path, export: Path) -> None:
    """From the bytes of random images to logits, probabilities and features."""
    compiled = openvino.Core().compile_model(export / FILE, "CPU", SETTINGS)
    model, description = load_checkpoint(small_run / "checkpoints" / "best.safetensors")
    spec = description.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (5, spec.img_size, spec.img_size, 3), np.uint8)
    scaled = (torch.from_numpy(pixels) / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    with torch.no_grad():
        logits = model.eval()(scaled.permute(0, 3, 1, 2)).numpy()
    found = compiled({"image": pixels})
    assert np.abs(found["logits"] - logits).max() <= 1e-4 * max(1, np.abs(logits).max())
    assert np.allclose(found["probabilities"], torch.from_numpy(logits).softmax(1), atol=1e-4)
    assert np.allclose(found["features"], Predictor(export, 1, "cpu").features(pixels), atol=1e-4)


def test_ir_is_complete(export: Path) -> None:
    """float32 weights, and the metadata of model.onnx; no path of this machine."""
    network = openvino.Core().read_model(export / FILE)
    about = json.loads(network.get_rt_info(["framework", "resnet_dist"]).astype(str))
    assert about == Predictor(export, 1, "cpu").metadata
    weights = (export / FILE).with_suffix(".bin").stat().st_size
    assert weights > 0.95 * (export / "model.onnx").stat().st_size
    assert str(export.parent) not in (export / FILE).read_text()


def test_report_lists_the_ir(export: Path) -> None:
    report = report_of(export)
    assert report["passed"] and list(report["files_mib"]) == ["model.onnx", FILE]
    measured, native = report[FILE]["openvino"], report["model.onnx"]["cpu"]
    assert measured["images"] == native["images"] == 6 and measured["top1_agreement"] == 1
    assert 0 < measured["max_logit_difference"] < 1e-4 and measured["max_feature_difference"] is not None
    assert report["files_mib"][FILE] == pytest.approx(
        sum(part.stat().st_size for part in parts(export / FILE)) / 2**20, abs=0.1
    )


def test_a_wrong_ir_is_refused_and_removed(
    small_run: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose weights have 10 bits, as OpenVINO writes by default; model.onnx stays."""

    def compressed(model: Path, file: Path) -> str:
        openvino.save_model(openvino.Core().read_model(model), file)
        return "compressed"

    monkeypatch.setattr("export.openvino_ir.write_ir", compressed)
    out = tmp_path / "out"
    said = refused(6, "export", small_run, "-o", out, *WORDS)
    assert f"the gate refused {FILE}: " in said and "logits are off by" in said and "model.onnx passed" in said
    assert report_of(out)["refused"] == [FILE] and (out / "model.onnx").exists() and (out / "predict.py").exists()
    assert list(out.glob("model.openvino.*")) == []


def test_without_openvino_nothing_is_done(
    small_run: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else real(name, *rest)
    )
    said = refused(2, "export", small_run, "-o", tmp_path / "out", "--openvino")
    assert said.splitlines() == [
        "resnet-dist export: error: --openvino needs openvino: pip install 'resnet-dist[openvino]'"
    ]
    assert not (tmp_path / "out").exists()


def test_same_network_gives_same_weights(export: Path, tmp_path: Path) -> None:
    """The names of nodes in the other part are numbered by OpenVINO, on through a process."""
    shutil.copyfile(export / "model.onnx", tmp_path / "model.onnx")
    write_ir(tmp_path / "model.onnx", tmp_path / FILE)
    one, other = ((folder / FILE).with_suffix(".bin").read_bytes() for folder in (tmp_path, export))
    assert one == other
