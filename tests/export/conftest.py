"""A small trained run and its export, shared by the tests of this folder."""

import json
import os
import shutil
from pathlib import Path
from typing import NoReturn

import onnx
import pytest

from export.browser import RUNTIME, TESTED_VERSION
from export.predict import digest_of
from resnet_dist.cli.main import main
from tests.conftest import TINY, make_folder

NODE_MODULES = Path(__file__).parents[2] / ".ci/node/node_modules"
INT8 = ["--int8", "--min-agreement", "80"]  # 18 of 18 images show 82.4 %


def unavailable(reason: str) -> NoReturn:
    """Skip; in CI, which must be able to install everything, fail."""
    if os.environ.get("RESNET_DIST_CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def node() -> str:
    """The path of Node.js."""
    return shutil.which("node") or unavailable("needs Node.js")


@pytest.fixture(scope="session")
def onnxruntime_web() -> Path:
    """The folder of the npm package."""
    folder = NODE_MODULES / "onnxruntime-web"
    if not all((folder / name).is_file() for name in RUNTIME):
        unavailable(f"needs `npm install --prefix .ci/node onnxruntime-web@{TESTED_VERSION}`, as in .ci/run")
    assert json.loads((folder / "package.json").read_text())["version"] == TESTED_VERSION
    return folder


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


def resealed(model: onnx.ModelProto, path: Path) -> Path:
    """Write the model with a checksum that fits."""
    (entry,) = (p for p in model.metadata_props if p.key == "resnet_dist_sha256")
    data = model.SerializeToString()
    path.write_bytes(data.replace(entry.value.encode(), digest_of(data, entry.value).encode()))
    return path
