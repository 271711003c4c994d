"""`resnet-dist export`: what the files are, that they equal the checkpoint, and that the gate can refuse."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from export.bundle import config_of
from export.predict import Predictor
from resnet_dist.cli.main import main
from resnet_dist.model.checkpoint import load_checkpoint
from tests.conftest import CLASSES, make_folder
from tests.export.conftest import INT8

Refused = Callable[..., str]
FILES = ("model.onnx", "model.fp16.onnx", "model.int8.onnx")


def export(*arguments: str | Path) -> int:
    return main(["export", *map(str, arguments), "--threads", "1"])


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("name", FILES)
def test_file_runs_on_old_runtimes_and_contains_no_paths(bundle: Path, name: str) -> None:
    """Opset 18, IR 8, one readable dynamic axis, everything inside, no path of this machine."""
    model = onnx.load(bundle / name, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    domains = {entry.domain: entry.version for entry in model.opset_import}
    assert domains[""] == 18 and set(domains) == {node.domain for node in model.graph.node}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    data = (bundle / name).read_bytes()
    for secret in (str(Path(__file__).parents[2]), str(Path(torch.__file__).parents[1]), "site-packages", str(bundle)):
        assert secret.encode() not in data


def test_bundle_holds_what_a_deployer_needs(bundle: Path) -> None:
    names = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    others = "labels.txt config.json preprocessor_config.json export_report.json gate.json predict.py README.md"
    vectors = {"test_data_set_0/input_0.pb", "test_data_set_0/output_0.pb"}
    assert names == {*FILES, *others.split(), *vectors}
    assert (bundle / "labels.txt").read_text().split() == list(CLASSES)
    config = json.loads((bundle / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "emu"} and config["depths"] == [2, 2, 2, 2]
    processor = json.loads((bundle / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 18} and processor["crop_size"] == {"height": 16, "width": 16}
    assert "python predict.py model.onnx --verify" in (bundle / "README.md").read_text()


def test_config_of_networks_that_transformers_has_no_class_for_names_its_wrapper_of_timm() -> None:
    config = config_of({"architecture": "wide_resnet50_2", "classes": ["cat", "dog"]})
    assert config["model_type"] == "timm_wrapper" and config["architecture"] == "wide_resnet50_2"
    assert config["id2label"] == {"0": "cat", "1": "dog"} and "depths" not in config


def test_predict_py_is_the_predictor_itself(bundle: Path) -> None:
    import export.predict

    assert (bundle / "predict.py").read_bytes() == Path(export.predict.__file__).read_bytes()


def test_metadata_is_the_contract(bundle: Path, small_run: Path) -> None:
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    values = json.loads(properties["resnet_dist"])
    assert values["classes"] == list(CLASSES)
    assert values["preprocessing"] == json.loads((small_run / "preprocess.json").read_text())
    assert values["architecture"] == "resnet18" and values["stem"] == "small" and values["head"]["name"] == "linear"
    import hashlib

    best = small_run / "checkpoints/best.safetensors"
    assert values["checkpoint_sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert properties["Image.BitmapPixelFormat"] == "Rgb8" and properties["Image.ColorSpaceGamma"] == "SRGB"


def test_digest_is_the_sha256_with_its_own_digits_zeroed(bundle: Path) -> None:
    import hashlib

    for name in FILES:
        data = (bundle / name).read_bytes()
        digest = {p.key: p.value for p in onnx.load(bundle / name).metadata_props}["resnet_dist_sha256"].encode()
        assert data.count(digest) == 1
        assert hashlib.sha256(data.replace(digest, b"0" * 64)).hexdigest().encode() == digest


def test_export_again_is_the_same_bytes(bundle: Path, small_run: Path, tmp_path: Path) -> None:
    assert export(small_run, "-o", tmp_path / "again") == 0
    assert (tmp_path / "again/model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()


def test_vectors_are_what_the_model_gives(bundle: Path) -> None:
    given, expected = (
        onnx.TensorProto.FromString((bundle / f"test_data_set_0/{n}_0.pb").read_bytes()) for n in ("input", "output")
    )
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {given.name: onnx.numpy_helper.to_array(given)})[0]
    np.testing.assert_allclose(found, onnx.numpy_helper.to_array(expected), rtol=1e-4, atol=1e-5)


def test_predictions_equal_those_of_eval(bundle: Path, small_run: Path, tmp_path: Path) -> None:
    """The same classes and, within 1e-4, the same probabilities for every validation image."""
    expected = {row["path"]: row for row in rows(small_run / "eval/val/predictions.csv")}
    data = Path(json.loads((small_run / "run.json").read_text())["data_root"])
    arguments = [str(bundle / "model.onnx"), str(data / "val"), "--output", str(tmp_path / "p.csv"), "--threads", "1"]
    assert main(["predict", *arguments]) == 0
    found = rows(tmp_path / "p.csv")
    assert len(found) == len(expected) == 18
    for row in found:
        other = expected[str(Path(row["path"]).relative_to(data))]
        assert [row[f"top{k}"] for k in (1, 2, 3)] == [other[f"top{k}"] for k in (1, 2, 3)]
        for k in (1, 2, 3):
            assert float(row[f"p{k}"]) == pytest.approx(float(other[f"p{k}"]), abs=1e-4)


def test_in_graph_file_is_bit_equal_to_the_float_one(bundle: Path, small_run: Path, tmp_path: Path) -> None:
    assert export(small_run, "-o", tmp_path / "pixels", "--preprocess-in-graph", "--fp16", *INT8) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    floating, in_graph = (Predictor(folder / "model.onnx", threads=1) for folder in (bundle, tmp_path / "pixels"))
    assert np.array_equal(floating.logits(pixels), in_graph.logits(pixels))
    session = onnxruntime.InferenceSession(tmp_path / "pixels/model.onnx", providers=["CPUExecutionProvider"])
    logits, probabilities = session.run(["logits", "probabilities"], {"image": pixels})
    np.testing.assert_allclose(probabilities, torch.from_numpy(logits).softmax(1).numpy(), atol=1e-6)
    assert session.get_modelmeta().custom_metadata_map["Image.NominalPixelRange"] == "NominalRange_0_255"
    for name in FILES[1:]:
        assert Predictor(tmp_path / "pixels" / name, threads=1).logits(pixels).shape == (7, 3)


def test_int8_really_is_8_bits_and_fp16_16(bundle: Path) -> None:
    sizes = {name: (bundle / name).stat().st_size for name in FILES}
    assert sizes["model.fp16.onnx"] < 0.51 * sizes["model.onnx"]
    assert sizes["model.int8.onnx"] < 0.27 * sizes["model.onnx"]
    quantized = {t.name: t.data_type for t in onnx.load(bundle / "model.int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in quantized.values() and onnx.TensorProto.UINT8 in quantized.values()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_files_agree_with_the_full_one(bundle: Path, small_run: Path, precision: str) -> None:
    report = json.loads((bundle / "export_report.json").read_text())
    found = report[f"model.{precision}.onnx"]["cpu"]
    data = Path(json.loads((small_run / "run.json").read_text())["data_root"])
    files = sorted(str(file) for file in (data / "val").rglob("*.png"))
    names = [
        [p.classes[0] for p in Predictor(bundle / n, threads=1).predict(files)]
        for n in ("model.onnx", f"model.{precision}.onnx")
    ]
    agreement = np.mean([a == b for a, b in zip(*names, strict=True)])
    assert found["images"] == 18 and found["agreement"] == pytest.approx(agreement)
    assert found["agreement_interval"][0] < agreement <= found["agreement_interval"][1]


@pytest.mark.parametrize(
    ("options", "pixels"),
    [
        ("--head concat-pool --dropout 0.2 --stem standard --img-size 64", 64),
        pytest.param("--head mlp --head-hidden 32,16 --dropout 0.2", 16, marks=pytest.mark.matrix),
        pytest.param("--model resnet50 --stem standard --img-size 64", 64, marks=pytest.mark.matrix),
        pytest.param("--resize-mode pad --img-size 40", 40, marks=pytest.mark.matrix),
    ],
)
def test_every_kind_of_network_passes_the_gate(options: str, pixels: int, tmp_path: Path) -> None:
    """Weights with statistics that are not the initial ones; the gate compares with torch from the files on."""
    from tests.conftest import TINY

    data = make_folder(tmp_path / "data", train=8, val=4)
    common = [*TINY, "--epochs", "1", "-b", "12", "--save-every", "9epochs"]
    assert main(["train", str(data), *common, *options.split(), "-o", str(tmp_path / "run")]) == 0
    assert export(tmp_path / "run") == 0
    report = json.loads((tmp_path / "run/export/export_report.json").read_text())
    found = report["model.onnx"]["cpu"]
    assert report["passed"] and found["inputs_equal"]
    assert found["max_logit_difference"] <= 1e-4 * max(1, found["max_logit"])
    predictor = Predictor(tmp_path / "run", threads=1)
    predictor.verify()
    model, _ = load_checkpoint(tmp_path / "run/checkpoints/best.safetensors")
    x = np.random.default_rng(1).integers(0, 256, (5, pixels, pixels, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(predictor.inputs(x)["pixel_values"])).numpy()
    np.testing.assert_allclose(predictor.logits(x), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_checkpoint_without_its_run_is_exported(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With images it is verified on them; otherwise on synthetic images, as the terminal and the report say."""
    shutil.copy(small_run / "checkpoints/best.safetensors", tmp_path / "mine.safetensors")
    assert export(tmp_path / "mine.safetensors") == 0
    assert "synthetic" in capsys.readouterr().out
    report = json.loads((tmp_path / "export/export_report.json").read_text())
    assert report["gate_images"] == "synthetic" and report["model.onnx"]["cpu"]["accuracy_onnx"] is None
    data = json.loads((small_run / "run.json").read_text())["data_root"]
    assert export(tmp_path / "mine.safetensors", "--data", data, "-o", tmp_path / "proven") == 0
    report = json.loads((tmp_path / "proven/export_report.json").read_text())
    assert report["gate_images"] == "given" and report["model.onnx"]["cpu"]["images"] == 18


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exported graph have other weights than the checkpoint."""
    import export.to_onnx as to_onnx

    real = to_onnx.graph_of

    def wrong(model: torch.nn.Module, *rest: Any) -> onnx.ModelProto:
        with torch.no_grad():
            model.fc.bias[0] += 0.01  # type: ignore[union-attr, index, operator]
        graph = real(model, *rest)
        with torch.no_grad():
            model.fc.bias[0] -= 0.01  # type: ignore[union-attr, index, operator]
        return graph

    monkeypatch.setattr(to_onnx, "graph_of", wrong)


def test_gate_refuses_a_file_that_differs(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    spoil(monkeypatch)
    said = refused(6, "export", small_run, "-o", tmp_path / "out", "--threads", "1")
    assert re.search(r"gate refused the export: model.onnx: .*\.png: logits are off by 1.0e-02", said)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["export_report.json"]
    assert not json.loads((tmp_path / "out/export_report.json").read_text())["passed"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"], "nothing half-written is left"


def test_gate_refuses_wrong_preprocessing(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """A predictor that crops one pixel further is noticed by the first image."""
    import export.predict as predict

    real = predict.Predictor.load

    def shifted(self: Predictor, image: Any) -> Any:
        name, pixels, error = real(self, image)
        return name, np.roll(pixels, 1, axis=0), error

    monkeypatch.setattr(predict.Predictor, "load", shifted)
    assert "the input differs from that of training" in refused(6, "export", small_run, "-o", tmp_path / "out")


def test_a_refused_export_leaves_the_old_one(
    bundle: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    out = tmp_path / "out"
    shutil.copytree(bundle, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert "it contains an export already" in refused(2, "export", small_run, "-o", out)
    spoil(monkeypatch)
    refused(6, "export", small_run, "-o", out, "--overwrite")
    after = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    failed = after.pop(out / "export_report.failed.json")
    assert after == before and not json.loads(failed)["passed"]


def test_bad_targets_and_sources(small_run: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "note").write_text("mine")
    assert "is not an export" in refused(2, "export", small_run, "-o", tmp_path / "note")
    assert (tmp_path / "note").read_text() == "mine"
    assert "cannot be" in refused(4, "export", small_run, "-o", "/proc/nowhere/out")
    assert "there is no such checkpoint" in refused(6, "export", tmp_path)
    assert "RUN is missing" in refused(2, "export")
    assert "--no-reduce-range needs --int8" in refused(2, "export", small_run, "--no-reduce-range")
    said = refused(2, "export", small_run, "--int8", "--min-agreement", "101")
    assert "--min-agreement 101: must be at least 0 and at most 100" in said
    shutil.copy(small_run / "checkpoints/best.safetensors", tmp_path / "x.safetensors")
    said = refused(2, "export", tmp_path / "x.safetensors", "--int8", "-o", tmp_path / "out")
    assert "--int8 needs training images" in said and not (tmp_path / "out").exists()
    few = make_folder(tmp_path / "few", train=3, val=2)
    said = refused(3, "export", small_run, "--data", few, "--int8", "-o", tmp_path / "out")
    assert "at least 64 training images" in said


def test_checkpoint_with_another_head_than_it_says(small_run: Path, tmp_path: Path, refused: Refused) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    best = small_run / "checkpoints/best.safetensors"
    with safe_open(best, framework="pt") as opened:
        values = json.loads(opened.metadata()["resnet_dist"])
    values["head"] = {"name": "mlp", "hidden": [8], "dropout": 0.0}
    save_file(load_file(best), tmp_path / "x.safetensors", metadata={"resnet_dist": json.dumps(values)})
    said = refused(6, "export", tmp_path / "x.safetensors", "-o", tmp_path / "out")
    assert "its tensors differ from those of the described network" in said and not (tmp_path / "out").exists()


def test_run_module_is_the_same_command(small_run: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "export", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: resnet-dist export")
