"""The folder for the Hub in transformers and in transformers.js, and how far their preprocessing is from ours.

They are slow to import or to install, so they run only with `pytest -m matrix`.
"""

import contextlib
import io
import json
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.bundle import preprocessor_config_of
from export.predict import Predictor, Preprocessing, decode, fit, normalise
from resnet_dist.cli.main import main
from resnet_dist.report.hub_folder import crop_share
from tests.export.test_runtimes import install, output, unavailable

pytestmark = pytest.mark.matrix

TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
EXTENSIONS = (".jpg", ".jpeg", ".png")


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The library without its progress bars and its log; skips without it, which is an error in CI."""
    try:
        import transformers
    except ImportError as error:
        unavailable(str(error))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Path]:
    """Every second photograph of ants and bees, which have many sizes."""
    files = sorted(p for p in (shared / "hymenoptera").rglob("*") if p.suffix.lower() in EXTENSIONS)
    return files[::2]


@pytest.fixture(scope="module")
def published(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hub's folder of a head on real ImageNet features, with its export."""
    root = tmp_path_factory.mktemp("published")
    weights = str(shared / "weights/resnet18.safetensors")
    options = [
        "--model",
        "resnet18",
        "--weights",
        weights,
        "--recipe",
        "feature-extractor",
        "--epochs",
        "1",
        "--no-report",
    ]
    assert main(["train", str(shared / "hymenoptera"), *options, "-o", str(root / "run")]) == 0
    assert main(["export", str(root / "run"), "--images", "4"]) == 0
    assert main(["hub", str(root / "run"), "-o", str(root / "hub"), "--license", "other"]) == 0
    return root / "hub"


def test_pipeline_of_transformers_gives_our_labels(
    transformers: Any, published: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are equal, as its preprocessing is timm's; the block in the card prints the best one."""
    classify = transformers.pipeline("image-classification", model=str(published))
    some = photos[::8]
    expected = list(Predictor(published / "onnx/model.onnx").predict(some))
    found = classify([str(photo) for photo in some], top_k=2)
    for theirs, ours in zip(found, expected, strict=True):
        assert [entry["label"] for entry in theirs] == list(ours.classes)
        assert [entry["score"] for entry in theirs] == pytest.approx(list(ours.probabilities), abs=1e-5)
    shutil.copy(photos[0], published / "photo.jpg")
    monkeypatch.chdir(published)
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "transformers" in block)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    assert said.getvalue().split()[0] == expected[0].classes[0]


@pytest.fixture
def site(published: Path, tmp_path: Path) -> Iterator[str]:
    """A server that has the folder as the repository NAME."""
    place = tmp_path / "served/NAME/resolve"
    place.mkdir(parents=True)
    (place / "main").symlink_to(published, target_is_directory=True)

    class Files(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_transformers_js_runs_the_published_folder(
    published: Path, photos: list[Path], site: str, tmp_path: Path
) -> None:
    """The block in the card under node. It resizes without antialiasing, so its scores differ; most labels do not."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        unavailable("needs npm and node")
    # Its scripts would download CUDA for onnxruntime-node, whose package has the library for the CPU.
    install(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", TRANSFORMERS_JS], tmp_path)
    (code,) = re.findall(r"```js\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    some = photos[::4]
    files = json.dumps([str(photo) for photo in some])
    loop = f"for (const file of {files}) console.log(JSON.stringify(await classify(file)));"
    code = re.sub(r"console\.log\(await classify.*", lambda _: loop, code)
    code = code.replace("env.remote", f"env.cacheDir = './cache'; env.remoteHost = {site!r};\nenv.remote", 1)
    (tmp_path / "card.mjs").write_text(code)
    lines = [json.loads(line) for line in output(["node", "card.mjs"], tmp_path).splitlines() if line.startswith("[")]
    expected = list(Predictor(published / "onnx/model.onnx").predict(some))
    assert len(lines) == len(expected)
    assert all({entry["label"] for entry in line} == {"ants", "bees"} for line in lines)
    same = [line[0]["label"] == ours.classes[0] for line, ours in zip(lines, expected, strict=True)]
    apart = [
        abs(line[0]["score"] - ours.probabilities[ours.classes.index(line[0]["label"])])
        for line, ours in zip(lines, expected, strict=True)
    ]
    print(f"transformers.js: {sum(same)} of {len(same)} labels equal, scores {np.mean(apart):.3f} apart on average")
    assert np.mean(same) >= 0.8 and np.mean(apart) < 0.15


# How far the processors are


def levels_apart(processor: Any, file: Path, spec: Preprocessing) -> float:
    """The largest difference of a channel of a pixel, in levels of 0..255."""
    image = decode(file)
    ours = normalise(fit(image, spec), spec).transpose(2, 0, 1)
    theirs = np.asarray(processor(images=Image.fromarray(np.asarray(image)), return_tensors="pt")["pixel_values"][0])
    return float((np.abs(ours - theirs) * 255 * np.array(spec.std).reshape(3, 1, 1)).max())


@pytest.mark.parametrize(
    ("mode", "name", "one_level", "more"),
    [
        ("crop", "TimmWrapperImageProcessor", (0, 0), (0, 0)),  # of the Hub's folder
        ("crop", "CLIPImageProcessorPil", (0.13, 0.2), (0.13, 0.2)),  # of an export
        ("crop", "CLIPImageProcessor", (0.9, 1), (0.13, 0.2)),
        ("squash", "ViTImageProcessorPil", (0, 0), (0, 0)),
        ("squash", "ViTImageProcessor", (0.9, 1), (0, 0)),
    ],
)
def test_processors_of_transformers_are_as_far_as_the_pages_say(
    transformers: Any,
    photos: list[Path],
    mode: str,
    name: str,
    one_level: tuple[float, float],
    more: tuple[float, float],
) -> None:
    """The share of photographs that differ at all, and the share in which a crop begins a pixel earlier."""
    spec = Preprocessing(resize_mode=mode, resize=256 if mode == "crop" else 224)
    config = preprocessor_config_of(spec)
    config.pop("image_processor_type")
    if name.startswith("Timm"):
        cfg = {"input_size": [3, 224, 224], "crop_pct": crop_share(224, 256), "interpolation": spec.interpolation}
        config = {"pretrained_cfg": {**cfg, "mean": list(spec.mean), "std": list(spec.std), "num_classes": 2}}
    processor = getattr(transformers, name)(**config)
    apart = np.array([levels_apart(processor, file, spec) for file in photos])
    shares = (float((apart > 0.01).mean()), float((apart > 1.5).mean()))
    print(f"{name}: of {len(photos)} photographs {shares[0]:.1%} differ, {shares[1]:.1%} by more than one level")
    assert one_level[0] <= shares[0] <= one_level[1] and more[0] <= shares[1] <= more[1]
