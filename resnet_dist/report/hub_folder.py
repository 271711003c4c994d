"""Write a folder for the Hugging Face Hub: config.json and model.safetensors for timm, a card, onnx/ for JavaScript."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from export.predict import ModelError, Predictor
from resnet_dist.errors import ArtifactError, MachineError
from resnet_dist.files.header import best_of, description_in
from resnet_dist.files.outputs import Kind, inside, make_folder
from resnet_dist.files.run import to_json, write_atomically
from resnet_dist.model.checkpoint import Description
from resnet_dist.model.published import CROP_MODES
from resnet_dist.model.weights import sha256_of
from resnet_dist.report.card import CardFacts, card, is_plain, loading_with_ours, loading_with_torchvision, start_of

ONNX = ("onnx/model.onnx", "onnx/config.json", "onnx/preprocessor_config.json")
FILES = ("README.md", "config.json", "model.safetensors", *ONNX)
TIMM_CROP_MODES = {ours: theirs for theirs, ours in CROP_MODES.items()}


def _is_checkpoint(file: Path) -> bool:
    try:
        return description_in(file) is not None
    except ArtifactError:
        return False


HUB_FOLDER = Kind("a folder that `hub` wrote", "model.safetensors", _is_checkpoint)


@dataclass(frozen=True)
class Publication:
    """What the front matter of a card says in addition to the facts of the run.

    Attributes:
        start: the initial weights, in words.
        license: as the Hub writes it; None if nobody stated one.
        base_model, dataset: repositories on the Hub, or None.
    """

    start: str
    license: str | None
    base_model: str | None
    dataset: str | None

    @classmethod
    def of(cls, run: CardFacts, license: str | None, base_model: str | None, dataset: str | None) -> "Publication":
        """What was given, and otherwise what the run knows of its initial weights."""
        known = run.facts.get("weights")
        items = known.items() if isinstance(known, dict) else ()
        stated = {name: value for name, value in items if isinstance(value, str)}
        license, base_model = license or stated.get("license"), base_model or stated.get("base_model")
        return cls(str(start_of(run)), license, base_model, dataset)


def exported_model(run: Path) -> tuple[Predictor | None, str]:
    """The float32 export of the run's best checkpoint, or None and the reason with what to do."""
    file = run / "export" / "model.onnx"
    again = f"`resnet-dist export {run} --overwrite`"
    if not file.is_file():
        return None, f"the run is not exported; `resnet-dist export {run}`, then this command again"
    try:
        exported = Predictor(file, threads=1, providers="cpu")
    except ModelError as error:
        raise ArtifactError(str(error)) from None
    if exported.metadata.get("checkpoint_sha256") != sha256_of(best_of(run)):
        return None, f"{file} is of another checkpoint; {again}, then this command again"
    if exported.metadata.get("input") != "pixel_values":
        return None, f"{file} normalises in the graph; {again}, then this command again"
    return exported, ""


def write_hub_folder(
    run: Path, folder: Path, card_facts: CardFacts, publication: Publication, export: Predictor | None
) -> list[Path]:
    """Write the folder and return its files. There is no config.json if timm cannot build the network, and no onnx/
    without an export.

    Raises UsageError, MachineError, ArtifactError.
    """
    best, config = best_of(run), folder / "config.json"
    make_folder(folder, HUB_FOLDER)
    inside(folder, "onnx")
    try:
        weights = best.read_bytes()
        if not card_facts.is_plain and not config.is_symlink():
            config.unlink(missing_ok=True)  # of an earlier run
        for name in ONNX if export is None else ():
            (folder / name).unlink(missing_ok=True)
        if export is not None:
            (folder / "onnx").mkdir(exist_ok=True)
    except OSError as error:
        kind = ArtifactError if error.filename == str(best) else MachineError
        raise kind(f"{error.filename}: cannot be read or written ({error.strerror})") from None
    write_atomically(folder / HUB_FOLDER.mark, weights)
    if card_facts.is_plain:
        write_atomically(config, to_json(timm_config(card_facts.description, publication.license)))
    if export is not None:
        write_onnx(folder, export)
    write_atomically(folder / "README.md", hub_card(card_facts, publication, export is not None))
    return [folder / name for name in FILES if (folder / name).exists()]


def write_onnx(folder: Path, export: Predictor) -> None:
    """Write onnx/, a model of transformers.js, from a finished export. Raises ArtifactError, MachineError."""
    labels = {str(index): name for index, name in enumerate(export.classes)}
    config = {  # transformers.js runs any image classifier under this name
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "id2label": labels,
        "label2id": {name: index for index, name in enumerate(export.classes)},
    }
    try:
        model, processor = (export.path.with_name(Path(name).name).read_bytes() for name in (ONNX[0], ONNX[2]))
    except OSError as error:
        raise ArtifactError(f"{error.filename}: cannot be read ({error.strerror})") from None
    write_atomically(folder / ONNX[0], model)
    write_atomically(folder / ONNX[1], to_json(config))
    write_atomically(folder / ONNX[2], processor)


def timm_config(description: Description, license: str | None) -> dict[str, Any]:
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
            "crop_mode": TIMM_CROP_MODES[spec.resize_mode],
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": architecture.num_classes,
            "pool_size": None,
            "first_conv": "conv1",
            "classifier": "fc",
            "license": license,
        },
    }


def crop_share(img_size: int, resize: int) -> float:
    """timm's `crop_pct`. timm resizes the short side to floor(img_size / crop_pct), which must equal `resize`."""
    share = img_size / resize
    while math.floor(img_size / share) < resize:
        share = math.nextafter(share, 0)
    return share


def hub_card(run: CardFacts, publication: Publication, has_onnx: bool) -> str:
    """The model card with the front matter that the Hub reads."""
    architecture, spec = run.description.architecture, run.description.preprocessing
    text = loading_with_ours("model.safetensors")
    if run.is_plain:
        plain = [] if spec.resize_mode == "pad" else loading_with_torchvision("model.safetensors", architecture, spec)
        text = [*loading_with_timm(), "", *loading_with_transformers(), "", *plain, "", *text]
    else:
        text = [f"timm and torchvision cannot build this network ({why_not(run)}); resnet-dist loads it.", "", *text]
    if has_onnx:
        text += ["", *loading_with_javascript()]
    return front_matter(run, publication) + card(run, "model.safetensors", text)


def why_not(run: CardFacts) -> str:
    """The parts of the network that timm cannot build."""
    architecture = run.description.architecture
    parts = [f"head {architecture.head}"] if architecture.head != "linear" else []
    return " and ".join([*parts, "small stem"] if architecture.stem != "standard" else parts)


def front_matter(run: CardFacts, publication: Publication) -> str:
    """YAML between two lines of dashes, as huggingface_hub writes it. A metric's name has its interval."""
    metrics, intervals = run.metrics, run.metrics.get("intervals", {})
    results = []
    for kind, shown, name in (("accuracy", "top-1 accuracy", "top1"), ("f1", "macro-F1", "macro_f1")):
        low, high = intervals.get(name, (None, None))
        interval = f" (95 % interval {low:.4f} to {high:.4f})" if low is not None else ""
        results.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=publication.dataset or "imagefolder",
                dataset_name="validation images",
                metric_type=kind,
                metric_value=metrics[name],
                metric_name=shown + interval,
            )
        )
    data = ModelCardData(
        license=publication.license,
        base_model=publication.base_model,
        datasets=None if publication.dataset is None else [publication.dataset],
        pipeline_tag="image-classification",
        library_name="timm" if run.is_plain else "resnet-dist",
        tags=["image-classification", "resnet", *(["timm"] if run.is_plain else []), "resnet-dist"],
        metrics=["accuracy", "f1"],
        model_name="classifier",
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


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


def loading_with_transformers() -> list[str]:
    """A Markdown code block that classifies photo.jpg with transformers, which uses timm."""
    return """With transformers, through timm and with its preprocessing (use NAME instead of `.` after the upload):

```python
from transformers import pipeline

best = pipeline("image-classification", model=".")("photo.jpg")[0]
print(best["label"], best["score"])
```""".splitlines()


def loading_with_javascript() -> list[str]:
    """A Markdown code block that classifies photo.jpg with transformers.js after the upload."""
    return """With transformers.js, after the upload (it resizes without antialiasing: about one label in ten differs):

```js
import { env, pipeline } from "@huggingface/transformers";

env.remotePathTemplate = "{model}/resolve/{revision}/onnx/";
const classify = await pipeline("image-classification", "NAME", { subfolder: "", dtype: "fp32" });
console.log(await classify("photo.jpg"));
```""".splitlines()
