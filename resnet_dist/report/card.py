"""The model card in Markdown: results, data, training, limits, and code that loads the model."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.predict import Preprocessing
from resnet_dist.errors import ArtifactError
from resnet_dist.files.header import best_of, description_in
from resnet_dist.files.run import identity, read_facts
from resnet_dist.model.checkpoint import Description
from resnet_dist.model.resnet import Architecture
from resnet_dist.model.start import StartingPoint
from resnet_dist.runtime.wording import counted, precision_name, printable

SHOWN_CLASSES = 50


@dataclass(frozen=True)
class CardFacts:
    """The input of a card: run.json, the metrics with their intervals, the description of the checkpoint."""

    facts: Mapping[str, Any]
    metrics: Mapping[str, Any]
    description: Description

    @property
    def is_plain(self) -> bool:
        """Whether torchvision and timm can build this network."""
        return is_plain(self.description.architecture)


def is_plain(architecture: Architecture) -> bool:
    """Whether torchvision and timm can build this network: standard stem and linear head."""
    return architecture.stem == "standard" and architecture.head == "linear"


def start_of(run: CardFacts) -> StartingPoint:
    """The initial weights of the run."""
    config = run.description.config
    return StartingPoint.of(str(config.get("model", {}).get("weights")), config.get("run", {}).get("init_from"))


def read_card_facts(run: Path) -> CardFacts:
    """Read a finished run. Raises UsageError if it is not a run, ArtifactError if a file is missing or damaged."""
    facts, best = read_facts(run), best_of(run)
    try:
        metrics = json.loads((run / "eval" / "val" / "metrics.json").read_text(encoding="utf-8"))
        description = Description.from_dict(description_in(best) or {})
        for name in ("images", "top1", "macro_f1", "loss"):
            float(metrics[name])
    except OSError as error:
        raise ArtifactError(f"{run}: {Path(error.filename).name} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{run}: its metrics or its checkpoint's description are damaged ({error})") from None
    return CardFacts(facts, metrics, description)


def plain_text(name: str) -> str:
    """A name from the data, escaped for Markdown, so that a class name cannot become a link or a heading."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~$:-])", r"\\\1", printable(name).replace("\n", " "))


def card(run: CardFacts, weights: str, how_to_load: Sequence[str]) -> str:
    """The card as Markdown. `weights`: the file with the weights; `how_to_load`: lines of code that load it."""
    sections = {
        "Results": _results(run),
        "Load and predict": [*how_to_load],
        "Data": _data(run),
        "Training": _training(run),
        "Limits": _limits(run),
    }
    architecture = run.description.architecture
    what = f"{architecture.name}, {counted(architecture.num_classes, 'class')}" + (
        "" if run.is_plain else f", head {architecture.head}"
    )
    if architecture.stem != "standard":
        what += ", stem for small images (3x3, no pooling)"
    what += f". Trained: {plain_text(identity(run.facts))}. Weights: `{weights}`."
    lines = [f"# {plain_text(_name_of_data(run))}: an image classifier", "", what]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return "\n".join(lines) + "\n"


def _name_of_data(run: CardFacts) -> str:
    return Path(str(run.facts.get("data_root", ""))).name or "images"


def _results(run: CardFacts) -> Iterator[str]:
    yield f"On {run.metrics['images']} validation images, evaluated in float32:"
    yield ""
    yield "| metric | value | 95 % interval |"
    yield "|---|---|---|"
    names = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "macro_f1": "macro-F1", "loss": "loss (nats)"}
    if run.description.architecture.num_classes <= 5:
        del names["top5"]  # it is always 1
    intervals = run.metrics.get("intervals", {})
    for name, shown in {**names, "ece": "calibration error (ECE)"}.items():
        if name in run.metrics:
            interval = intervals.get(name)
            text = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            yield f"| {shown} | {run.metrics[name]:.4f} | {text} |"
    yield ""
    yield "`eval/val/` in the run folder has every image, every class and the confusion matrix."


def _data(run: CardFacts) -> Iterator[str]:
    counts = run.facts.get("images", {})
    parts = ", ".join(f"{number:,} {split}" for split, number in counts.items() if number)
    yield f"`{printable(_name_of_data(run)).replace('`', ' ')}`: {parts} images."
    data = run.facts.get("data")
    if data:
        yield f"Fingerprint of paths, classes and splits: `{data['sha256']}`."
    classes = run.description.classes
    shown = ", ".join(plain_text(name) for name in classes[:SHOWN_CLASSES])
    more = f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else ""
    yield f"Classes, in the order of the outputs: {shown}{more}."


def _training(run: CardFacts) -> Iterator[str]:
    facts, config = run.facts, run.description.config
    optim = config.get("optim", {})
    yield f"- recipe {config.get('recipe') or 'none'}; initial weights: {plain_text(str(start_of(run)))}"
    yield (
        f"- {optim.get('opt')}, lr {optim.get('lr')}, global batch {facts.get('global_batch')}, "
        f"seed {facts.get('seed')}; {counted(facts.get('epochs', 0), 'epoch')}, the best was {run.description.epoch}"
    )
    for number, phase in enumerate(config.get("phase", []), 1):
        yield f"- phase {number}: trains {plain_text(str(phase.get('trainable')))}"
    if "seconds" in facts:
        yield f"- {facts['seconds'] / 60:.1f} minutes on {_machine(facts)}"
    versions = (facts.get("launches") or [{}])[-1].get("versions", {})
    yield f"- made with {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _machine(facts: Mapping[str, Any]) -> str:
    launch = (facts.get("launches") or [{}])[-1]
    hardware, processes = launch.get("hardware", {}), launch.get("processes", 1)
    device = (hardware.get("gpus") or [hardware.get("cpu")])[0] if launch.get("device") == "cuda" else None
    name = device or f"{hardware.get('cpu')} ({hardware.get('cores')} cores)"
    return f"{name}, {counted(processes, 'process')}, precision {precision_name(str(launch.get('precision')))}"


def _limits(run: CardFacts) -> Iterator[str]:
    metrics, classes = run.metrics, run.description.architecture.num_classes
    yield f"- The model assigns one of {counted(classes, 'class')} to every image, even if the image shows none."
    yield "- The best epoch was chosen on the validation images, so the metrics on new images may be slightly lower."
    yield "- The intervals hold for similar images, not for other cameras, places or times."
    if int(metrics["images"]) < 30 * classes:
        yield f"- {metrics['images']} validation images are few for {classes} classes, so the intervals are wide."
    yield "- The rights to the images, and whether the model is fit for a purpose, were not checked."


# How to load it


def loading_with_torchvision(weights: str, architecture: Architecture, spec: Preprocessing) -> list[str]:
    """A Markdown code block that classifies photo.jpg with torch and torchvision; for plain networks."""
    resize = {
        "crop": f"v2.Resize({spec.resize}, v2.InterpolationMode.{spec.interpolation.upper()})",
        "squash": f"v2.Resize(({spec.img_size}, {spec.img_size}), v2.InterpolationMode.{spec.interpolation.upper()})",
    }
    return f"""With torchvision:

```python
import torch
import torchvision
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torchvision.transforms import v2

model = torchvision.models.{architecture.name}(num_classes={architecture.num_classes})
model.load_state_dict(load_file("{weights}"))
model.eval()
prepare = v2.Compose([
    {resize[spec.resize_mode]},
    v2.CenterCrop({spec.img_size}),
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize({list(spec.mean)}, {list(spec.std)}),
])
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
with torch.inference_mode():
    probabilities = model(prepare(image)[None]).softmax(1)[0]
print(int(probabilities.argmax()), float(probabilities.max()))
```""".splitlines()


def loading_with_ours(weights: str) -> list[str]:
    """A Markdown code block that classifies photo.jpg with this package; for all networks and preprocessings."""
    return f"""With resnet-dist, which also has the exact preprocessing:

```python
from pathlib import Path

import torch
from export.predict import decode, fit, normalise
from resnet_dist.model.checkpoint import load_checkpoint

model, description = load_checkpoint(Path("{weights}"))
pixels = normalise(fit(decode("photo.jpg"), description.preprocessing), description.preprocessing)
with torch.inference_mode():
    probabilities = model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).softmax(1)[0]
print(description.classes[int(probabilities.argmax())], float(probabilities.max()))
```""".splitlines()


def run_card(run: CardFacts) -> str:
    """The README.md of a finished run."""
    weights = "checkpoints/best.safetensors"
    architecture, spec = run.description.architecture, run.description.preprocessing
    lines = loading_with_ours(weights)
    if run.is_plain and spec.resize_mode != "pad":
        lines = [*loading_with_torchvision(weights, architecture, spec), "", *lines]
    lines += ["", "Without torch: `resnet-dist export` on this folder, then `resnet-dist predict`."]
    return card(run, weights, lines)
