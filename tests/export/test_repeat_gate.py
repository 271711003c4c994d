"""`predict --verify --images` repeats the gate without torch, from the records that the export wrote."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.predict import Predictor, main
from tests.conftest import write_image
from tests.export.conftest import resealed


@pytest.fixture(scope="module")
def images(small_run: Path) -> Path:
    """The validation images of the run."""
    return Path(json.loads((small_run / "run.json").read_text())["data_root"]) / "val"


def verify(capsys: pytest.CaptureFixture[str], model: Path, folder: Path) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(model), "--verify", "--images", str(folder), "--threads", "1", "--providers", "cpu"])
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err


def test_records_are_torchs_logits_of_the_files(bundle: Path, small_run: Path, images: Path) -> None:
    """Computed again in plain torch, one image at a time."""
    import torch

    from resnet_dist.model.checkpoint import load_checkpoint

    best = small_run / "checkpoints/best.safetensors"
    model, _ = load_checkpoint(best)
    files = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in images.rglob("*.png")}
    predictor = Predictor(bundle, 1, "cpu")
    gate = json.loads((bundle / "gate.json").read_text())
    assert {entry["file"] for entry in gate["images"]} == set(files)
    assert gate["checkpoint_sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert gate["min_agreement"] == {"fp32": 1.0, "fp16": 0.995, "int8": 0.8}
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (predictor.preprocessing.mean, predictor.preprocessing.std))
    for entry in gate["images"]:
        loaded = predictor.load(files[entry["file"]])[1]
        assert loaded is not None and hashlib.sha256(loaded.tobytes()).hexdigest() == entry["pixels"]
        scaled = torch.tensor(loaded).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            expected = model.eval()((scaled - mean) / std)[0]
        np.testing.assert_allclose(entry["logits"], expected, atol=1e-4 * max(1, float(expected.abs().max())))


def test_every_file_passes_without_torch(bundle: Path, images: Path, tmp_path: Path) -> None:
    """In a process that cannot import torch, from a copy of two of the files; other images do not matter."""
    for name in ("model.onnx", "gate.json"):
        shutil.copy(bundle / name, tmp_path)
    shutil.copytree(images, tmp_path / "photos")
    write_image(tmp_path / "photos/other.png", seed=9)
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'onnx', 'resnet_dist', 'scipy']));"
    start = "sys.argv[0] = 'predict.py'; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-I", "-c", block + start, str(bundle / "predict.py"), "model.onnx", "--verify"]
    command += ["--images", "photos", "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "with cpu, 18 of the 18 images of the gate: pixels equal" in done.stdout
    assert "same class on 100.00 %" in done.stdout


@pytest.mark.parametrize("name", ["model.fp16.onnx", "model.int8.onnx"])
def test_smaller_files_pass_by_their_classes(
    bundle: Path, images: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = verify(capsys, bundle / name, images)
    assert code == 0 and "with cpu, 18 of the 18 images" in said


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_a_runtime_that_computes_otherwise_fails(
    bundle: Path, images: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 by its logits, int8 by its classes."""
    real = Predictor.logits
    monkeypatch.setattr(Predictor, "verify", lambda self: "0.0e+00")
    monkeypatch.setattr(Predictor, "logits", lambda self, pixels: real(self, pixels) + np.float32([0, 0.01, 50]))
    code, said = verify(capsys, bundle / name, images)
    assert code == 6 and len(said.splitlines()) == 1
    expected = "relative error of the logits" if name == "model.onnx" else "less than the 80 % that the export demanded"
    assert expected in said


def test_other_pixels_fail(
    bundle: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another decoder: one value of one pixel differs by one."""
    real = Predictor.load

    def decoded_otherwise(self: Predictor, image: Any) -> Any:
        name, pixels, error = real(self, image)
        if pixels is None:
            return name, pixels, error
        changed = pixels.copy()
        changed[0, 0, 0] ^= 1
        return name, changed, error

    monkeypatch.setattr(Predictor, "load", decoded_otherwise)
    code, said = verify(capsys, bundle / "model.onnx", images)
    assert code == 6 and "its pixels after resize and crop differ from training's" in said


def test_other_weights_fail(bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with a changed weight of the head and a self-test of its own: only the images show it."""
    model = onnx.load(bundle / "model.onnx")
    bias = next(t for t in model.graph.initializer if list(t.dims) == [3])
    bias.raw_data = (onnx.numpy_helper.to_array(bias) + np.float32([0.02, 0, 0])).tobytes()
    (entry,) = (p for p in model.metadata_props if p.key == "resnet_dist")
    values = json.loads(entry.value)
    values["self_test"][0] += 0.02
    entry.value = json.dumps(values)
    resealed(model, tmp_path / "model.onnx")
    shutil.copy(bundle / "gate.json", tmp_path)
    assert main([str(tmp_path / "model.onnx"), "--verify", "--threads", "1"]) == 0
    code, said = verify(capsys, tmp_path / "model.onnx", images)
    assert code == 6 and "relative error of the logits" in said


def test_records_that_cannot_be_used(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, damaged, of another checkpoint, or of other images: one line each."""
    shutil.copy(bundle / "model.onnx", tmp_path)
    model, gate = tmp_path / "model.onnx", tmp_path / "gate.json"
    assert verify(capsys, model, images)[1].endswith("verified on image files writes it\n")
    text = (bundle / "gate.json").read_text()
    for damaged in (text[:100], "", "[]", "{}", "[" * 10**5, text.replace('"images":[', '"images":[1,')):
        gate.write_text(damaged)
        code, said = verify(capsys, model, images)
        assert code == 6 and "gate.json: cannot be read" in said and len(said.splitlines()) == 1
    values = json.loads(text)
    for other in (
        {"checkpoint_sha256": "0" * 64},
        {"images": []},
        {"images": [values["images"][0] | {"logits": [1.0]}]},
    ):
        gate.write_text(json.dumps(values | other))
        code, said = verify(capsys, model, images)
        assert code == 6 and "belongs to another model" in said
    shutil.copy(bundle / "gate.json", gate)
    write_image(tmp_path / "photos/other.png", seed=3)
    code, said = verify(capsys, model, tmp_path / "photos")
    assert code == 3 and "no image there is one that the export was verified on" in said


def test_options_that_do_not_fit(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["x.png", "--verify"], "--verify takes no INPUT"),
        (["x.png", "--images", "photos"], "--images needs --verify"),
        (["x.png", "--link"], "--link needs --sort-into"),
        (["x.png", "--stream"], "x.png: --stream watches folders"),
        (["holiday.MP4"], "videos are not supported; extract frames first"),
    ):
        assert main([str(bundle), *arguments]) == 2
        assert said in capsys.readouterr().err
