"""The int8 file: right on CPUs that saturate, and refused unless it is shown to agree with float32."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from export import quantize
from export.predict import Predictor
from export.verify import images_needed, judge_agreement
from resnet_dist.cli.main import main
from resnet_dist.evaluation.intervals import wilson
from tests.export.conftest import INT8

Refused = Callable[..., str]
EXACT = {"session.x64quantprecision": "1"}  # onnxruntime then multiplies bytes without saturation, as VNNI does
PIXELS = 255  # the largest activation


def plant(monkeypatch: pytest.MonkeyPatch, bias: list[float]) -> None:
    """Let the int8 file be made from a network whose last layer has this bias."""
    real = quantize.to_int8

    def wrong(graph: onnx.ModelProto, *rest: Any) -> tuple[onnx.ModelProto, quantize.Choice]:
        copy = onnx.ModelProto.FromString(graph.SerializeToString())
        gemm = next(node for node in copy.graph.node if node.op_type == "Gemm")
        tensor = next(t for t in copy.graph.initializer if t.name == gemm.input[2])
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(bias, np.float32), tensor.name))
        return real(copy, *rest)

    monkeypatch.setattr(quantize, "to_int8", wrong)
    monkeypatch.setattr(
        quantize, "rounded_weights", lambda weights, *rest: weights
    )  # most of the time, for nothing here


def everything(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_refused_int8_leaves_the_files_that_passed(
    bundle: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """One line, exit code 6; float32 and fp16 are written with all that belongs to them, byte for byte as without."""
    plant(monkeypatch, [1e3, 0, 0])
    out = tmp_path / "out"
    said = refused(6, "export", small_run, "-o", out, "--fp16", *INT8, "--threads", "1")
    assert "gate refused model.int8.onnx: int8 has the same top-1 as float32 on 6 of 18 images (33.3 %, 95 %" in said
    assert f"less than the 80 % of --min-agreement; model.onnx, model.fp16.onnx passed and is in {out}" in said
    assert len(said.splitlines()) == 1
    found, whole = everything(out), everything(bundle)
    report = json.loads(found.pop(Path("export_report.json")))
    assert set(whole) - set(found) == {Path("export_report.json"), Path("model.int8.onnx")}
    assert all(found[name] == whole[name] for name in found)
    assert report["refused"] == ["model.int8.onnx"] and not report["passed"]
    assert any("points of top-1" in problem for problem in report["problems"])


def test_refused_int8_keeps_the_existing_export(
    bundle: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    plant(monkeypatch, [1e3, 0, 0])
    shutil.copytree(bundle, tmp_path / "out")
    said = refused(6, "export", small_run, "-o", tmp_path / "out", "--overwrite", *INT8, "--threads", "1")
    assert "the existing export is unchanged" in said and "all reasons are in" in said
    found = everything(tmp_path / "out")
    assert not json.loads(found.pop(Path("export_report.failed.json")))["passed"]
    assert found == everything(bundle)


def test_int8_of_equal_accuracy_but_other_classes_is_refused(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """Labels that are right as often for the one file as for the other do not hide that they disagree."""
    from resnet_dist.data.index import read_part
    from tests.conftest import CLASSES

    plant(monkeypatch, [1e3, 0, 0])
    out = tmp_path / "out"
    data = Path(json.loads((small_run / "run.json").read_text())["data_root"])
    balanced = tmp_path / "balanced"
    shutil.copytree(data, balanced)
    for file in (balanced / "val/dog").iterdir():  # int8 says cat to everything
        shutil.move(file, balanced / "val/cat" / f"dog-{file.name}")
    refused(6, "export", small_run, "--data", balanced, "-o", out, *INT8, "--max-accuracy-drop", "100")
    assert len(read_part(balanced, "val", CLASSES)) == 18
    report = json.loads((out / "export_report.json").read_text())["model.int8.onnx"]["cpu"]
    assert report["accuracy"] >= report["accuracy_fp32"] and report["agreement"] < 0.5
    assert len(report["problems"]) == 1 and "same top-1" in report["problems"][0]


def test_too_few_images_to_decide(small_run: Path, tmp_path: Path, refused: Refused) -> None:
    """18 images, all with the same class from both files, show 82.4 % and not the 90 % asked for by default."""
    said = refused(6, "export", small_run, "-o", tmp_path / "out", "--int8", "--threads", "1")
    assert "model.int8.onnx: too few images to decide: int8 has the same top-1 as float32 on 18 of 18 images" in said
    assert "(100.0 %, 95 % interval 82.4 to 100.0 %), which does not prove the 90 % of --min-agreement" in said
    assert "about 35 such images would be enough" in said
    assert (tmp_path / "out/model.onnx").exists() and not (tmp_path / "out/model.int8.onnx").exists()


@pytest.mark.parametrize(
    ("same", "n", "bound", "begins"),
    [
        (35, 35, 0.9, None),
        (34, 34, 0.9, "too few images to decide"),
        (840, 1000, 0.9, "int8 has the same top-1"),
        (100, 148, 0.9, "int8 has the same top-1"),
        (85, 100, 0.9, "too few images to decide"),
        (930, 1000, 0.9, None),
        (0, 1, 0.9, "int8 has the same top-1"),
        (1, 1, 0.0, None),
        (500, 500, 1.0, "too few images to decide"),
    ],
)
def test_three_answers_about_agreement(same: int, n: int, bound: float, begins: str | None) -> None:
    found = judge_agreement(same, n, bound)
    assert (found == []) if begins is None else found[0].startswith(begins)


@pytest.mark.parametrize(("share", "bound"), [(1.0, 0.9), (1.0, 0.95), (0.97, 0.9), (0.92, 0.9), (0.995, 0.99)])
def test_images_needed_are_the_fewest(share: float, bound: float) -> None:
    """With that number the lower end of the interval reaches the bound, with one image fewer it does not."""
    needed = images_needed(share, bound)
    assert needed is not None
    low, lower = (wilson(share * n, n)[0] for n in (needed, needed - 1))  # type: ignore[arg-type]
    assert lower < bound <= low + 1e-12
    assert images_needed(bound, bound) is None


def convolution(weights: np.ndarray) -> onnx.ModelProto:
    """float32 (batch, C, 4, 4) through one convolution with these weights, as the quantiser takes it."""
    name = "pixel_values"
    kinds = (
        (onnx.TensorProto.FLOAT, ["batch", weights.shape[1], 4, 4]),
        (onnx.TensorProto.FLOAT, ["batch", "c", "h", "w"]),
    )
    given, put_out = (onnx.helper.make_tensor_value_info(n, *k) for n, k in zip((name, "logits"), kinds, strict=True))
    node = onnx.helper.make_node("Conv", [name, "w"], ["logits"], "conv")
    graph = onnx.helper.make_graph([node], "g", [given], [put_out], [onnx.numpy_helper.from_array(weights, "w")])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


def run(graph: onnx.ModelProto, x: np.ndarray, settings: dict[str, str]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"pixel_values": x})[0])


def test_the_largest_sums_are_right_with_7_bits() -> None:
    """All weights at the end of their range, all activations too: the worst case for 16 bits, right on every CPU."""
    channels = 64
    weights = np.ones((8, channels, 3, 3), np.float32) * np.array([1, -1] * 4, np.float32)[:, None, None, None]
    x = np.full((2, channels, 4, 4), PIXELS, np.float32)
    safe, full = (quantize.to_int8(convolution(weights), [x[0]], reduce)[0] for reduce in (True, False))
    expected = np.broadcast_to(PIXELS * weights.sum((1, 2, 3))[None, :, None, None], (2, 8, 2, 2))
    found = run(safe, x, {})
    np.testing.assert_allclose(found, expected, rtol=0.01)
    assert np.array_equal(found, run(safe, x, EXACT))
    assert quantize.may_saturate(safe) == [] and quantize.may_saturate(full) == ["w_quantized"]
    np.testing.assert_allclose(run(full, x, EXACT), expected, rtol=0.01)


def test_weights_of_the_default_file_cannot_saturate(bundle: Path) -> None:
    """No two products of a weight and an activation leave 16 bits, and turning saturation off changes no bit."""
    graph = onnx.load(bundle / "model.int8.onnx")
    bytes_ = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(bytes_) >= 20
    for tensor in bytes_:
        rows = np.sort(onnx.numpy_helper.to_array(tensor).astype(int).reshape(tensor.dims[0], -1), axis=1)
        assert 255 * (rows[:, -1] + rows[:, -2]).max() < 2**15 and 255 * (rows[:, 0] + rows[:, 1]).min() >= -(2**15)
    assert quantize.may_saturate(graph) == []
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    x = Predictor(bundle / "model.int8.onnx", threads=1).inputs(pixels)["pixel_values"]
    assert np.array_equal(run(graph, x, {}), run(graph, x, EXACT))


def test_8_bit_weights_give_a_note_about_cpus(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--int8", "--min-agreement", "0", "--max-accuracy-drop", "100", "--no-reduce-range", "--threads", "1"]
    assert main(["export", str(small_run), "-o", str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "8-bit weights: x86 CPUs without VNNI can predict other classes" in said
    assert "same top-1 as fp32 on" in said and "95 % interval" in said
