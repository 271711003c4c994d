"""`export` returns the bundle that it wrote, is quiet, and its errors name keywords."""

import json
from pathlib import Path

import pytest
import torch

from export.predict import Predictor
from export.run import export
from resnet_dist.errors import UsageError
from resnet_dist.evaluation.run import evaluate
from tests.conftest import CLASSES


def test_the_bundle_that_is_returned_is_the_one_on_disk(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    threads = torch.get_num_threads()
    bundle = export(small_run, output_dir=tmp_path / "out", fp16=True, time=True, images=4, threads=1)
    assert capsys.readouterr() == ("", "") and torch.get_num_threads() == threads
    assert bundle.path == tmp_path / "out" and bundle.model == tmp_path / "out/model.onnx"
    assert {file.name for file in bundle.files} == {"model.onnx", "model.fp16.onnx"} == set(bundle.latency)
    assert all(file.is_file() and size > 0 for file, size in bundle.files.items())
    assert bundle.report == json.loads((tmp_path / "out/export_report.json").read_text())
    assert all(set(times) == {1, 32} and min(times.values()) > 0 for times in bundle.latency.values())
    shown = bundle._repr_html_()
    assert "model.fp16.onnx" in shown and "validation images" in shown
    assert Predictor(bundle, threads=1).classes == CLASSES


def test_an_exported_model_is_evaluated_as_its_run(small_run: Path, bundle: Path, tmp_path: Path) -> None:
    """Nothing is written unless that is asked for; then the same files are, without maps of evidence."""
    settings = {"workers": 0, "threads": 1}
    data = small_run.parent / "data"
    of_run = evaluate(small_run, save=False, **settings)
    of_model = evaluate(bundle / "model.onnx", data, **settings)
    assert of_model.folder is None and of_model.classes == CLASSES and of_model.spec == of_run.spec
    assert (of_model.records.classes == of_run.records.classes).all()
    assert of_model.metrics["loss"].value == pytest.approx(of_run.metrics["loss"].value, abs=1e-4)
    written = evaluate(bundle / "model.onnx", data, output_dir=tmp_path / "out", **settings)
    assert written.folder == tmp_path / "out" and (tmp_path / "out/report.html").is_file()


def test_with_verbose_every_check_is_printed(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(small_run, output_dir=tmp_path / "out", images=2, threads=1, verbose=True)
    said = capsys.readouterr().out
    assert "verifying on validation images" in said and f"written to {tmp_path / 'out'}: model.onnx" in said


def test_errors_name_keywords(small_run: Path, bundle: Path) -> None:
    with pytest.raises(UsageError) as raised:
        export(small_run, output_dir=bundle, min_agreement=101)
    assert raised.value.problems == ["min_agreement=101: must be at least 0 and at most 100"]
    with pytest.raises(UsageError) as raised:
        export(small_run, output_dir=bundle)
    assert "it contains an export already; choose another folder, or give overwrite" in str(raised.value)
    assert "--" not in str(raised.value)
