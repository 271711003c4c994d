"""`evaluate` returns in memory what the command line writes, is quiet, and its errors name keywords."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.predict import Preprocessing
from resnet_dist.cli.main import main
from resnet_dist.errors import ArtifactError, UsageError
from resnet_dist.evaluation.run import evaluate
from resnet_dist.report.on_disk import read_evaluation
from tests.conftest import CLASSES, TINY, make_folder

SETTINGS = {"workers": 0, "threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run; not to be changed by a test but for its folder eval."""
    place = tmp_path_factory.mktemp("evaluated")
    data = make_folder(place / "data")
    assert main(["train", str(data), "-o", str(place / "run"), *TINY, "-b", "8", "--epochs", "1"]) == 0
    return place / "run"


def test_memory_and_disk_are_equal(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    threads = torch.get_num_threads()
    evaluation = evaluate(run, output_dir=tmp_path / "out", embeddings=True, **SETTINGS)
    assert capsys.readouterr() == ("", "") and torch.get_num_threads() == threads
    assert evaluation.folder == tmp_path / "out" and evaluation.classes == CLASSES and len(evaluation) == 15
    read = read_evaluation(tmp_path / "out", evaluation.root, "val", CLASSES, evaluation.spec)
    for name in ("target", "loss", "classes", "probabilities", "features"):
        assert np.array_equal(getattr(read.records, name), getattr(evaluation.records, name)), name
    assert read.metrics == evaluation.metrics and read.facts == evaluation.facts and read.paths == evaluation.paths
    assert read.summary == evaluation.summary == json.loads((tmp_path / "out/metrics.json").read_text())
    assert evaluation.confusion.sum() == 15 and [row["images"] for row in evaluation.per_class] == [5, 5, 5]
    assert (tmp_path / "out/report.html").is_file() and (tmp_path / "out/embeddings.png").is_file()


def test_the_command_line_writes_the_same_and_prints_the_summary(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run, output_dir=tmp_path / "python", **SETTINGS)
    capsys.readouterr()
    assert main(["eval", str(run), "-o", str(tmp_path / "typed"), "--workers", "0", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "15 val images, float32" in said and "macro_f1" in said
    names = {file.name for file in (tmp_path / "typed").iterdir()}
    assert names == {file.name for file in (tmp_path / "python").iterdir()}
    for name in names - {"report.html"}:  # whose title is the folder's name
        assert (tmp_path / "typed" / name).read_bytes() == (tmp_path / "python" / name).read_bytes(), name


def test_a_checkpoint_is_evaluated_without_a_folder(run: Path) -> None:
    """The metrics are those of the run; nothing is written."""
    before = sorted(run.parent.rglob("*"))
    evaluation = evaluate(run / "checkpoints/best.safetensors", run.parent / "data", **SETTINGS)
    assert evaluation.folder is None and sorted(run.parent.rglob("*")) == before
    values = json.loads((run / "eval/val/metrics.json").read_text())
    assert {name: metric.value for name, metric in evaluation.metrics.items()} == pytest.approx(
        {name: values[name] for name in evaluation.metrics}, abs=1e-6
    )
    assert isinstance(evaluation.spec, Preprocessing) and evaluation.spec.img_size == 16


def test_a_run_folder_gets_the_evaluation_unless_it_is_not_saved(run: Path) -> None:
    assert evaluate(run, split="train", save=False, **SETTINGS).folder is None
    assert not (run / "eval/train").exists()
    assert evaluate(run, split="train", **SETTINGS).folder == run / "eval/train"
    assert (run / "eval/train/report.html").is_file()


def test_a_notebook_shows_the_metrics(run: Path) -> None:
    evaluation = evaluate(run, save=False, **SETTINGS)
    shown = evaluation._repr_html_()
    assert "15 val images" in shown and all(str(metric) in shown for metric in evaluation.metrics.values())
    assert repr(evaluation).startswith("Evaluation(15 val images, top1 0.")


def test_errors_name_keywords(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        evaluate(run, calibrate=True, split="test", batch_size=0, precison=0.5)
    assert "there is no keyword 'precison'; did you mean 'precision'?" in raised.value.problems
    assert any("calibrate needs split='val'" in problem for problem in raised.value.problems)
    assert any(problem.startswith("batch_size=0: must be at least 1") for problem in raised.value.problems)
    assert "--" not in str(raised.value)
    with pytest.raises(ArtifactError, match="there is no such checkpoint"):
        evaluate(tmp_path / "gone.safetensors", run.parent / "data", **SETTINGS)
