"""A small trained run and its export, shared by the tests of this folder."""

import json
from pathlib import Path

import pytest

from resnet_dist.cli.main import main
from tests.conftest import TINY, make_folder

INT8 = ["--int8", "--min-agreement", "80"]  # 18 of 18 images show 82.4 %


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 72 training images; its folder is not to be changed by a test."""
    root = tmp_path_factory.mktemp("exported")
    data = make_folder(root / "data", train=24, val=6)
    options = [*TINY, "--epochs", "3", "--batch-size", "12", "--opt", "adam", "--save-every", "99epochs"]
    assert main(["train", str(data), *options, "-o", str(root / "run")]) == 0
    best = json.loads((root / "run/run.json").read_text())["best"]
    assert best["top1"] > 0.8, "the network was to learn something"
    return root / "run"


@pytest.fixture(scope="session")
def bundle(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three files of that run."""
    out = tmp_path_factory.mktemp("bundle") / "export"
    assert main(["export", str(small_run), "-o", str(out), "--fp16", *INT8, "--threads", "1"]) == 0
    return out
