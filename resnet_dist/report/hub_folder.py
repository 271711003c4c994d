"""Write a folder for the Hugging Face Hub and timm: config.json, model.safetensors, README.md with front matter."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_dist.errors import ArtifactError, MachineError
from resnet_dist.files.header import best_of, description_in
from resnet_dist.files.outputs import Kind, make_folder
from resnet_dist.files.run import to_json, write_atomically
from resnet_dist.model.checkpoint import Description
from resnet_dist.report.card import CardFacts, card, is_plain, loading_with_ours, loading_with_torchvision

FILES = ("README.md", "config.json", "model.safetensors")
CROP_MODES = {"crop": "center", "squash": "squash", "pad": "border"}  # our name: the name in timm


def _is_checkpoint(file: Path) -> bool:
    try:
        return description_in(file) is not None
    except ArtifactError:
        return False


HUB_FOLDER = Kind("a folder that `hub` wrote", "model.safetensors", _is_checkpoint)


def write_hub_folder(run: Path, folder: Path, card_facts: CardFacts) -> list[Path]:
    """Write the folder and return its files. There is no config.json if timm cannot build the network.

    Raises UsageError, MachineError, ArtifactError.
    """
    best, config = best_of(run), folder / "config.json"
    make_folder(folder, HUB_FOLDER)
    try:
        weights = best.read_bytes()
        if not card_facts.is_plain and not config.is_symlink():
            config.unlink(missing_ok=True)  # of an earlier run
    except OSError as error:
        kind = ArtifactError if error.filename == str(best) else MachineError
        raise kind(f"{error.filename}: cannot be read or written ({error.strerror})") from None
    write_atomically(folder / HUB_FOLDER.mark, weights)
    if card_facts.is_plain:
        write_atomically(config, to_json(timm_config(card_facts.description)))
    write_atomically(folder / "README.md", hub_card(card_facts))
    return [folder / name for name in FILES if (folder / name).exists()]


def timm_config(description: Description) -> dict[str, Any]:
    """The config.json with which timm's `create_model("local-dir:FOLDER")` and `create_transform` give equal logits."""
    architecture, spec = description.architecture, description.preprocessing
    assert is_plain(architecture)
    return {
        "architecture": architecture.name,
        "num_classes": architecture.num_classes,
        "num_features": 512 if architecture.name in ("resnet18", "resnet34") else 2048,
        "global_pool": "avg",
        "label_names": list(description.classes),
        "pretrained_cfg": {
            "tag": "resnet_dist",
            "custom_load": False,
            "input_size": [3, spec.img_size, spec.img_size],
            "fixed_input_size": False,
            "interpolation": spec.interpolation,
            "crop_pct": crop_share(spec.img_size, spec.resize),
            "crop_mode": CROP_MODES[spec.resize_mode],
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": architecture.num_classes,
            "pool_size": None,
            "first_conv": "conv1",
            "classifier": "fc",
            "license": "unknown",
        },
    }


def crop_share(img_size: int, resize: int) -> float:
    """timm's `crop_pct`. timm resizes the short side to floor(img_size / crop_pct), which must equal `resize`."""
    share = img_size / resize
    while math.floor(img_size / share) < resize:
        share = math.nextafter(share, 0)
    return share


def hub_card(run: CardFacts) -> str:
    """The model card with the front matter that the Hub reads."""
    architecture, spec = run.description.architecture, run.description.preprocessing
    text = loading_with_ours("model.safetensors")
    if run.is_plain:
        plain = [] if spec.resize_mode == "pad" else loading_with_torchvision("model.safetensors", architecture, spec)
        text = [*loading_with_timm(), "", *plain, "", *text]
    else:
        text = [f"timm and torchvision cannot build this network ({why_not(run)}); resnet-dist loads it.", "", *text]
    return front_matter(run.metrics, run.is_plain) + card(run, "model.safetensors", text)


def why_not(run: CardFacts) -> str:
    """The parts of the network that timm cannot build."""
    architecture = run.description.architecture
    parts = [f"head {architecture.head}"] if architecture.head != "linear" else []
    return " and ".join([*parts, "small stem"] if architecture.stem != "standard" else parts)


def front_matter(metrics: Mapping[str, Any], is_plain: bool) -> str:
    """YAML between two lines of dashes. Values are written as JSON, which is valid YAML."""
    values = [{"type": "accuracy", "value": metrics["top1"]}, {"type": "f1", "value": metrics["macro_f1"]}]
    task = {"type": "image-classification"}
    results = [{"task": task, "dataset": {"type": "imagefolder", "name": "validation images"}, "metrics": values}]
    fields = {
        "pipeline_tag": "image-classification",
        "library_name": "timm" if is_plain else "resnet-dist",
        "tags": ["image-classification", "resnet", *(["timm"] if is_plain else []), "resnet-dist"],
        "metrics": ["accuracy", "f1"],
        "model-index": [{"name": "classifier", "results": results}],
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", "", ""])


def loading_with_timm() -> list[str]:
    """A Markdown code block that classifies photo.jpg with timm."""
    return """With timm (use `hf-hub:NAME` instead of `local-dir:.` after the upload):

```python
import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model("local-dir:.", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
with torch.inference_mode():
    probabilities = model(prepare(image)[None]).softmax(1)[0]
print(model.pretrained_cfg["label_names"][int(probabilities.argmax())], float(probabilities.max()))
```""".splitlines()
