"""`eval` of two processes writes what one writes: records, calibration, embeddings."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from resnet_dist.cli.main import main
from tests.conftest import TINY, make_folder
from tests.runtime.launch import together


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    data = make_folder(root / "data", train=8, val=5)
    (data / "val/cat/val000.png").rename(data / "val/dog/moved.png")  # a mistake, without which there is no temperature
    options = [*TINY, "--epochs", "1", "--batch-size", "12", "--opt", "adam", "--save-every", "99epochs"]
    assert main(["train", str(data), *options, "-o", str(root / "run")]) == 0
    return root / "run"


def read(folder: Path) -> tuple[dict[str, float], list[list[str]], np.ndarray]:
    values = json.loads((folder / "metrics.json").read_text())
    with (folder / "predictions.csv").open(newline="") as stream:
        return values, list(csv.reader(stream)), np.load(folder / "embeddings.npy")


def test_two_processes_evaluate_and_calibrate_as_one(run: Path, tmp_path: Path) -> None:
    """Fifteen images in batches of 4: one process has one image less, and one batch is short."""
    options = ["--calibrate", "--precision", "0.5", "--embeddings", "-b", "4", "--workers", "0", "--threads", "1"]
    assert main(["eval", str(run), *options, "-o", str(tmp_path / "one")]) == 0
    calibration = run / "checkpoints/calibration.json"
    alone = json.loads(calibration.read_text())
    calibration.unlink()
    together(2, "eval", run, *options, "-o", tmp_path / "two")
    shared = json.loads(calibration.read_text())
    assert shared["temperature"] == pytest.approx(alone["temperature"], rel=1e-4)
    assert len(shared["thresholds"]) == 3
    for one, other in zip(shared["thresholds"], alone["thresholds"], strict=True):
        assert one is other is None or one == pytest.approx(other, abs=1e-4)
    (numbers, rows, features), (expected, expected_rows, expected_features) = map(
        read, (tmp_path / "two", tmp_path / "one")
    )
    assert [row[:3] for row in rows] == [row[:3] for row in expected_rows]
    assert numbers["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert features == pytest.approx(expected_features, abs=1e-4)
