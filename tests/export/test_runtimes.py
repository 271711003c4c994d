"""The bundle where it is deployed: environments made by pip without torch, the oldest onnxruntime, a browser's.

Each test installs what it needs with pip or npm, so they run only with `pytest -m matrix`.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from export.predict import Predictor
from resnet_dist.cli.main import main
from tests.conftest import CLASSES, write_image
from tests.export.conftest import unavailable

pytestmark = pytest.mark.matrix

FILES = ("model.onnx", "model.fp16.onnx", "model.int8.onnx")
# The files are made for onnxruntime 1.15 and later; what has wheels for this Python. None is that old from 3.13 on.
OLDEST_ONNXRUNTIME = {(3, 11): "1.15.0", (3, 12): "1.17.0"}
OLD_PILLOW = "10.1.0"  # of that time, and for both
NEVER_NEEDED = ("torch", "torchvision", "onnx", "resnet_dist")


def run(command: Sequence[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command without this process's Python settings, which writes no bytecode next to the modules."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def output(command: Sequence[str | Path], cwd: Path) -> str:
    """What the command prints; it must succeed."""
    done = run(command, cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(command: Sequence[str | Path], folder: Path) -> None:
    """Run what a machine without the network cannot."""
    try:
        done = run(command, folder)
    except subprocess.TimeoutExpired as error:
        unavailable(str(error))
    if done.returncode:
        reason = re.search(r"^(npm )?error.*", done.stderr, re.IGNORECASE | re.MULTILINE)
        unavailable(f"{' '.join(map(str, command))} failed: {reason[0] if reason else done.stderr}")


def new_environment(folder: Path, *packages: str) -> Path:
    """The interpreter of a fresh virtual environment that holds these packages."""
    install([sys.executable, "-m", "venv", "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    install([python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *packages], folder)
    return python


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """An environment with what the bundle's README says to install."""
    line = re.search(r"^pip install (.+)$", (bundle / "README.md").read_text(), re.MULTILINE)
    assert line is not None and set(line[1].split()) == {"onnxruntime", "numpy", "pillow"}
    return new_environment(tmp_path_factory.mktemp("clean"), *line[1].split())


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    version = OLDEST_ONNXRUNTIME.get(sys.version_info[:2])
    if version is None:
        unavailable(f"no onnxruntime below 1.18 has a wheel for Python {sys.version_info[0]}.{sys.version_info[1]}")
    packages = (f"onnxruntime=={version}", "numpy<2", f"pillow=={OLD_PILLOW}")
    return new_environment(tmp_path_factory.mktemp("old"), *packages)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of every class, JPEG and PNG, in two folders."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    for number in range(9):
        file = f"{number % 2}/{number}.{'jpg' if number % 3 else 'png'}"
        write_image(folder / file, seed=number, tint=number, size=(40, 30))
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def assert_same_predictions(found: Path, expected: Path) -> None:
    """Equal cell for cell, but for the last digits of the probabilities."""
    assert len(rows(found)) == len(rows(expected)) == 9
    for row, other in zip(rows(found), rows(expected), strict=True):
        numbers = [name for name in other if re.fullmatch(r"p\d+", name)]
        assert len(numbers) == len(CLASSES)
        assert [float(row.pop(n)) for n in numbers] == pytest.approx([float(other.pop(n)) for n in numbers], abs=1e-5)
        assert row == other and row["prediction"] and not row["error"]
    assert {row["prediction"] for row in rows(found)} == set(CLASSES)


def check_in(python: Path, model: Path, photos: Path, tmp_path: Path) -> None:
    """The bundle's own predict.py under that interpreter: its self-test passes, its labels are those from here."""
    bundle = model.parent
    there, here = tmp_path / "there.csv", tmp_path / "here.csv"
    options = [str(photos), "--threads", "1", "--output"]
    output([python, "-W", "error", "predict.py", model.name, *options, there], bundle)
    assert main(["predict", str(model), *options, str(here)]) == 0
    assert_same_predictions(there, here)
    assert "checksum and self-test pass" in output([python, "predict.py", model.name, "--verify"], bundle)


@pytest.mark.parametrize("name", FILES)
def test_three_packages_are_enough(clean_python: Path, bundle: Path, photos: Path, tmp_path: Path, name: str) -> None:
    look = f"import importlib.util as u; print([n for n in {NEVER_NEEDED} if u.find_spec(n)])"
    assert output([clean_python, "-c", look], bundle).strip() == "[]", "the environment is not a clean one"
    check_in(clean_python, bundle / name, photos, tmp_path)


def test_predicting_as_a_library_loads_no_torch(bundle: Path, photos: Path) -> None:
    """In this environment, where torch and the package could be loaded."""
    code = (
        "import sys, predict; (found,) = predict.Predictor('model.onnx', threads=1).predict([sys.argv[1]]);"
        f"print(found.classes[0], [name for name in {NEVER_NEEDED} if name in sys.modules])"
    )
    assert output([sys.executable, "-c", code, photos / "1" / "1.jpg"], bundle).split() == ["dog", "[]"]


@pytest.mark.parametrize("name", FILES)
def test_oldest_runtime_gives_the_same_labels(
    old_python: Path, bundle: Path, photos: Path, tmp_path: Path, name: str
) -> None:
    """onnxruntime 1.15.0 under Python 3.11, 1.17.0 under 3.12, with numpy 1 and a Pillow of that time."""
    check_in(old_python, bundle / name, photos, tmp_path)


@pytest.fixture(scope="module")
def web_folder(tmp_path_factory: pytest.TempPathFactory, onnxruntime_web: Path) -> Path:
    """A folder with web.mjs that finds onnxruntime-web."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "node_modules").symlink_to(onnxruntime_web.parent)
    shutil.copy(Path(__file__).with_name("web.mjs"), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "tolerance"), [("model.onnx", 1e-4), ("model.fp16.onnx", 0.01), ("model.int8.onnx", 0.05)]
)
def test_browser_runtime_gives_the_same_labels(
    web_folder: Path, node: str, bundle: Path, photos: Path, tmp_path: Path, name: str, tolerance: float
) -> None:
    """onnxruntime-web against onnxruntime on the same input; the tolerance is a share of the largest logit."""
    predictor = Predictor(bundle / name, threads=1)
    loaded = [predictor.load(file)[1] for file in sorted(photos.rglob("*.*"))]
    given = predictor.inputs(np.stack([image for image in loaded if image is not None]))
    session = onnxruntime.InferenceSession(bundle / name, providers=["CPUExecutionProvider"])
    (native,) = session.run(["logits"], given)
    given["pixel_values"].tofile(tmp_path / "input.f32")
    dims = ",".join(map(str, given["pixel_values"].shape))
    said = output([node, "web.mjs", tmp_path / "input.f32", dims, bundle / name], web_folder)
    web = np.reshape(json.loads(said)[str(bundle / name)], native.shape)
    assert web.argmax(1).tolist() == native.argmax(1).tolist() and len(set(native.argmax(1))) == len(CLASSES)
    assert np.abs(web - native).max() <= tolerance * max(1, np.abs(native).max())
