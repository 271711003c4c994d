"""The page's scripts under Node.js: equal pixels become the input that predict.py makes of them, bit for bit."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.predict import FILTERS, Predictor, Preprocessing, decode, fit, normalise, self_test_pixels, to_rgb

SIZES = ((1, 1), (3, 500), (500, 3), (63, 64), (64, 64), (96, 64), (64, 97), (131, 199), (130, 194), (333, 251))


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's scripts as modules of Node.js."""
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("pixels.js", "scores.js"):
        (folder / name).write_bytes((resources.files("export") / "web" / name).read_bytes())
    (folder / "package.json").write_text('{"type": "module"}')
    shutil.copy(Path(__file__).with_name("pixels.mjs"), folder)
    return folder


def run(node: str, scripts: Path, **jobs: Any) -> dict[str, Any]:
    everything = {"pictures": [], "size": 1, "logits": [], "model": {}, **jobs}
    command = [node, "pixels.mjs"]
    done = subprocess.run(
        command, cwd=scripts, input=json.dumps(everything), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def specs() -> Iterator[Preprocessing]:
    """Every mode with every filter, growing and shrinking; odd differences for the rounding of the crop."""
    for mode in ("crop", "squash", "pad"):
        for name in FILTERS:
            for size, resize in ((64, 73), (63, 64), (160, 160)):
                yield Preprocessing(
                    img_size=size,
                    resize=resize if mode == "crop" else size,
                    resize_mode=mode,
                    interpolation=name,
                    fill=(1, 128, 250),
                    mean=(0.5, 0.456, 0.1),
                )


def assert_equal_to_pillow(node: str, scripts: Path, images: Sequence[Image.Image], folder: Path) -> None:
    """Every image with every setting: the pixels and the normalised values are those of predict.py."""
    jobs, expected = [], []
    for number, image in enumerate(images):
        (folder / f"{number}.rgba").write_bytes(image.convert("RGBA").tobytes())
        for spec in specs():
            job = {"file": str(folder / f"{number}.rgba"), "width": image.width, "height": image.height}
            jobs.append(job | {"spec": spec.to_dict(), "out": str(folder / f"{len(jobs)}.rgb")})
            expected.append((fit(to_rgb(image), spec), spec))
    run(node, scripts, pictures=jobs)
    differing = []
    for job, (pixels, spec) in zip(jobs, expected, strict=True):
        found = np.fromfile(job["out"], np.uint8).reshape(pixels.shape)
        values = np.fromfile(f"{job['out']}.f32", np.float32).reshape(3, *pixels.shape[:2])
        if not np.array_equal(found, pixels) or not np.array_equal(values, normalise(pixels, spec).transpose(2, 0, 1)):
            differing.append((job["width"], job["height"], spec))
    assert differing == []


def test_made_images_are_resized_as_by_pillow(node: str, scripts: Path, tmp_path: Path) -> None:
    """Noise, pure black and white (where bicubic overshoots), and transparency; some are so tall that Pillow resizes
    the height first."""
    random = np.random.default_rng(0)
    images = []
    for width, height in SIZES:
        images.append(Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    for width, height in SIZES[6:9]:
        images.append(Image.fromarray(random.choice([0, 255], (height, width, 3)).astype(np.uint8)))
    images.append(Image.fromarray(random.integers(0, 256, (90, 80, 4), dtype=np.uint8), "RGBA"))
    assert_equal_to_pillow(node, scripts, images, tmp_path)


@pytest.mark.matrix
def test_photographs_are_resized_as_by_pillow(node: str, scripts: Path, tmp_path: Path, shared: Path) -> None:
    files = sorted((shared / "hymenoptera/val").rglob("*.jpg"))[::12]
    assert_equal_to_pillow(node, scripts, [decode(file) for file in files], tmp_path)


def test_scores_are_those_of_predict(node: str, scripts: Path, bundle: Path) -> None:
    """Order, probabilities and whether the model abstains; equal logits keep the order of the classes."""
    predictor = Predictor(bundle / "model.onnx", threads=1)
    predictor.metadata["temperature"] = 1.7
    predictor.thresholds = (0.5, None, 0.99)
    rows = np.random.default_rng(0).normal(0, 3, (40, 3)).astype(np.float32)
    rows[0] = 0
    rows[1] = (800, -800, 0)
    model = {"temperature": 1.7, "thresholds": list(predictor.thresholds)}
    found = run(node, scripts, logits=rows.tolist(), model=model, size=16)
    probabilities = predictor._softmax(rows)
    for one, logits, values in zip(found["ranked"], rows, probabilities, strict=True):
        expected = predictor.best("image", (logits, values, None), 3, None)
        assert [predictor.classes[i] for i in one["order"]] == list(expected.classes)
        assert one["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        assert one["abstained"] == expected.abstained
    assert {one["abstained"] for one in found["ranked"]} == {True, False}
    assert found["self_test"] == self_test_pixels(16).ravel().tolist()
