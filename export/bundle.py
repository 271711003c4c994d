"""Write the export folder: the verified model files, and side files for other programs."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export import browser, triton
from export.openvino_ir import parts
from export.predict import FILTERS, Predictor, Preprocessing, self_test_pixels
from resnet_dist.errors import MachineError, UsageError
from resnet_dist.files.outputs import Kind, check_folder, json_with
from resnet_dist.files.run import is_written, sync_folder, to_json
from resnet_dist.runtime.wording import one_line

BUNDLE = Kind("an export", "export_report.json", json_with("passed", "problems", "gate_images"))
VECTORS = "test_data_set_0"
FOLDERS = (VECTORS, browser.FOLDER, triton.FOLDER)  # of the bundle
README = """# {architecture}, {count} classes

Exported by resnet-dist. `{model}` and `predict.py` are a complete deployment: the classes
and the preprocessing are in the metadata of `{model}`.

```
pip install onnxruntime numpy pillow
python predict.py {model} photos/
python predict.py {model} --verify
```

- Input: `{input}`; output `logits`. {description}
- Exact preprocessing: {preprocessing}
  Pillow before version 13 gives slightly different pixels for an image that loses more than twice as many rows as
  columns when it is resized. `--verify --images` with the validation images shows whether that matters.
- `labels.txt` lists the class names in index order. `export_report.json` holds the results of the verification.
  `test_data_set_0/` holds one input and its output in the layout of the ONNX model zoo.
- `config.json` and `preprocessor_config.json` are for libraries that read Hugging Face configurations. `predict.py` is
  exact, and these libraries are not: {apart}
"""


APART = {  # measured with transformers 5.24; tests/report/test_hub_clients.py
    "crop": """transformers begins the crop of an odd margin a pixel earlier, which
  was so for 17 in 100 photographs of many sizes. By default it also resizes with torchvision, which differs by up to
  one level of 255 in nearly every photograph; `backend="pil"` does not.""",
    "squash": """transformers resizes with torchvision by default, which differs by up
  to one level of 255 in nearly every photograph; `backend="pil"` is exact.""",
    "pad": "they squash the image and do not pad it, so their predictions are wrong.",
}


def write_side_files(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write labels, configurations, README.md, predict.py and test vectors into `folder`, next to model.onnx."""
    classes = metadata["classes"]
    spec = Preprocessing.from_dict(metadata["preprocessing"])
    labels = "".join(f"{one_line(name)}\n" for name in classes)
    (folder / "labels.txt").write_text(labels, encoding="utf-8", errors="surrogateescape")
    (folder / "config.json").write_text(to_json(config_of(metadata)))
    (folder / "preprocessor_config.json").write_text(to_json(preprocessor_config_of(spec)))
    description = {
        "image": f"uint8 (batch, {spec.img_size}, {spec.img_size}, 3), RGB; it is normalised in the graph.",
        "pixel_values": f"float32 (batch, 3, {spec.img_size}, {spec.img_size}), normalised by mean and std.",
    }[metadata["input"]]
    text = README.format(
        architecture=metadata["architecture"],
        count=len(classes),
        model="model.onnx",
        input=metadata["input"],
        description=description,
        preprocessing=json.dumps(metadata["preprocessing"]),
        apart=APART[spec.resize_mode],
    )
    (folder / "README.md").write_text(text)
    (folder / "predict.py").write_text(resources.files("export").joinpath("predict.py").read_text(encoding="utf-8"))
    write_vectors(folder / VECTORS, Predictor(folder / "model.onnx", providers="cpu"))


def config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in the style of Hugging Face's ResNet, or of its wrapper of timm for ResNeXt and Wide ResNet."""
    classes = metadata["classes"]
    labels = {
        "id2label": {str(index): label for index, label in enumerate(classes)},
        "label2id": {label: index for index, label in enumerate(classes)},
    }
    name = metadata["architecture"]
    depths = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}
    depths |= {"resnet101": [3, 4, 23, 3], "resnet152": [3, 8, 36, 3]}
    if name not in depths:
        timm = {"architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper"}
        return {**timm, "architecture": name, **labels}
    basic = name in ("resnet18", "resnet34")
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "layer_type": "basic" if basic else "bottleneck",
        "depths": depths[name],
        "hidden_sizes": [64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
        **labels,
    }


def preprocessor_config_of(spec: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json as Hugging Face's image processors read it."""
    crop = spec.resize_mode == "crop"
    side = {"height": spec.img_size, "width": spec.img_size}
    return {
        "image_processor_type": "CLIPImageProcessor" if crop else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": spec.resize} if crop else side,
        "resample": int(FILTERS[spec.interpolation]),
        "do_center_crop": crop,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "do_convert_rgb": True,
    }


def write_vectors(folder: Path, predictor: Predictor) -> None:
    """Write the self-test as input_0.pb (image) and output_0.pb (logits), in the layout of the ONNX model zoo."""
    folder.mkdir()
    pixels = self_test_pixels(predictor.preprocessing.img_size)
    ((name, given),) = predictor.inputs(pixels).items()
    for kind, label, values in (("input", name, given), ("output", "logits", predictor.logits(pixels))):
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(values), label)
        (folder / f"{kind}_0.pb").write_bytes(tensor.SerializeToString())


def check_target(out: Path, overwrite: bool) -> None:
    """Check, before any work, that the export can be written to `out`. Raises UsageError, MachineError."""
    check_folder(out, BUNDLE)
    if (out / "model.onnx").exists() and not overwrite:
        raise UsageError(
            f"--output-dir {out}: it contains an export already; choose another folder, or give --overwrite"
        )
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{out}: cannot be created ({parent} is not writable)")


def put_in_place(staging: Path, out: Path) -> None:
    """Rename the finished export to `out` in one step; an old export stays complete until then.

    Files in the old export that this program did not write are kept. Raises MachineError.
    """
    old = out.with_name(f".old-{os.getpid()}-{out.name}")
    try:
        for file in staging.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        if out.exists():
            out.rename(old)
        staging.rename(out)
        if old.exists():
            keep_others(old, out)
        sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise MachineError(f"{out}: cannot be written ({error.strerror})") from None


def keep_others(old: Path, out: Path, inside: tuple[str, ...] = ("export",)) -> None:
    """Move files that this program did not write from an old export into the new one. Raises OSError."""
    for entry in list(old.iterdir()):
        parts = (*inside, entry.name)
        if parts[1] in FOLDERS and entry.is_dir() and not entry.is_symlink():
            keep_others(entry, out / entry.name, parts)
        elif not is_written(parts):
            out.mkdir(parents=True, exist_ok=True)
            entry.rename(out / entry.name)


def sizes(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """The size of each model file in MiB, with the weights that are next to it."""
    return {name: round(sum(part.stat().st_size for part in parts(folder / name)) / 2**20, 1) for name in names}
