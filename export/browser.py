"""Write a static web page that classifies pictures in the browser with the exported model."""

import shutil
from importlib import resources
from pathlib import Path

from export.predict import SELF_TEST_TOLERANCE, Predictor
from resnet_dist.errors import UsageError
from resnet_dist.files.run import to_json

FOLDER = "web"  # of the export
PARTS = ("index.html", "style.css", "page.js", "worker.js", "pixels.js", "scores.js", "onnxruntime-web-LICENSE.txt")
PACKAGE, TESTED_VERSION = Path("node_modules/onnxruntime-web"), "1.30.0"
# The smallest build, which runs on the CPU: its script, and its code for one thread or many. The script gets the name
# that every server sends as JavaScript, which is not so for .mjs.
RUNTIME = {
    "dist/ort.wasm.bundle.min.mjs": "onnxruntime-web.js",
    "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}
MODELS = ("model.onnx", "model.int8.onnx")
NAMES = {"fp32": "float32", "int8": "int8"}


def find_runtime(folder: str | None) -> Path:
    """The folder of the npm package onnxruntime-web: `folder`, or node_modules/onnxruntime-web. Raises UsageError."""
    place = Path(folder) if folder is not None else PACKAGE
    missing = [name for name in RUNTIME if not (place / name).is_file()]
    if missing:
        option = f"--onnxruntime-web {place}" if folder is not None else "--web"
        raise UsageError(
            f"{option}: there is no {place / missing[0]}; run `npm install onnxruntime-web@{TESTED_VERSION}`, which "
            f"makes {PACKAGE}, or give the folder of that package with --onnxruntime-web"
        )
    return place


def write_web(export: Path, runtime: Path) -> None:
    """Write the folder `web` of an export, which any web server can serve as it is. `runtime`: see `find_runtime`."""
    folder = export / FOLDER
    folder.mkdir()
    for name in PARTS:
        (folder / name).write_bytes((resources.files("export") / "web" / name).read_bytes())
    for name, new_name in RUNTIME.items():
        shutil.copyfile(runtime / name, folder / new_name)
    models = [export / name for name in MODELS if (export / name).exists()]
    for model in models:
        shutil.copyfile(model, folder / model.name)
    (folder / "model.json").write_text(to_json(page_data(folder, models)))


def page_data(folder: Path, models: list[Path]) -> dict[str, object]:
    """What the page knows about the models; `models` are files of one export."""
    metadata = [Predictor(model, threads=1, providers="cpu").metadata for model in models]
    shared = {name: metadata[0][name] for name in ("architecture", "classes", "preprocessing", "input", "temperature")}
    files = [
        {
            "name": model.name,
            "precision": NAMES[values["precision"]],
            "bytes": model.stat().st_size,
            "self_test": values["self_test"],
            "tolerance": SELF_TEST_TOLERANCE[values["precision"]],
        }
        for model, values in zip(models, metadata, strict=True)
    ]
    wasm = folder / "ort-wasm-simd-threaded.wasm"
    return {
        **shared,
        "thresholds": metadata[0].get("thresholds", []),
        "files": files,
        "runtime_bytes": wasm.stat().st_size,
    }
