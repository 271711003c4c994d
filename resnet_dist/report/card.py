"""The model card in Markdown: what a run trained, how good it is, its limits, and how to load it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.predict import Preprocessing
from resnet_dist.errors import ArtifactError
from resnet_dist.files.header import best_of, description_in
from resnet_dist.files.run import read_facts
from resnet_dist.model.checkpoint import Description
from resnet_dist.model.resnet import Architecture
from resnet_dist.model.start import StartingPoint
from resnet_dist.runtime.wording import counted, printable

SHOWN_CLASSES = 50


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from: run.json, the metrics with their intervals, the checkpoint's description."""

    facts: Mapping[str, Any]
    metrics: Mapping[str, Any]
    description: Description

    @property
    def is_plain(self) -> bool:
        """Whether torchvision and timm have this network: the standard stem and a linear head."""
        return is_plain(self.description.architecture)


def is_plain(architecture: Architecture) -> bool:
    """Whether torchvision and timm can build this network themselves."""
    return architecture.stem == "standard" and architecture.head == "linear"


def read_card_facts(run: Path) -> CardFacts:
    """Read a finished run. Raises UsageError if it is none, ArtifactError if a file is missing or damaged."""
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
    """A name from the data, escaped for Markdown: a class name cannot become a link or a heading."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~$:-])", r"\\\1", printable(name).replace("\n", " "))


def card(known: CardFacts, weights: str, how_to_load: Sequence[str]) -> str:
    """The card as Markdown; `weights` is the file beside it that holds the weights, `how_to_load` its code."""
    sections = {
        "Results": _results(known),
        "Load and predict": [*how_to_load],
        "Data": _data(known),
        "Training": _training(known),
        "Limits": _limits(known),
    }
    made_of = known.description.architecture
    what = f"{made_of.name}, {counted(made_of.num_classes, 'class')}" + (
        "" if known.is_plain else f", head {made_of.head}"
    )
    if made_of.stem != "standard":
        what += ", stem for small images (3x3, no pooling)"
    lines = [f"# {plain_text(_name_of_data(known))}: an image classifier", "", f"{what}. Weights: `{weights}`."]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return "\n".join(lines) + "\n"


def _name_of_data(known: CardFacts) -> str:
    return Path(str(known.facts.get("data_root", ""))).name or "images"


def _results(known: CardFacts) -> Iterator[str]:
    yield f"On {known.metrics['images']} validation images, evaluated in float32:"
    yield ""
    yield "| metric | value | 95 % interval |"
    yield "|---|---|---|"
    names = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "macro_f1": "macro-F1", "loss": "loss (nats)"}
    if known.description.architecture.num_classes <= 5:
        del names["top5"]  # it says nothing
    intervals = known.metrics.get("intervals", {})
    for name, shown in {**names, "ece": "calibration error (ECE)"}.items():
        if name in known.metrics:
            interval = intervals.get(name)
            text = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            yield f"| {shown} | {known.metrics[name]:.4f} | {text} |"
    yield ""
    yield "`eval/val/` in the run folder has every image, every class and the confusion matrix."


def _data(known: CardFacts) -> Iterator[str]:
    counts = known.facts.get("images", {})
    parts = ", ".join(f"{number:,} {split}" for split, number in counts.items() if number)
    yield f"`{printable(_name_of_data(known)).replace('`', ' ')}`: {parts} images."
    data = known.facts.get("data")
    if data:
        yield f"Fingerprint of paths, classes and splits: `{data['sha256']}`."
    classes = known.description.classes
    shown = ", ".join(plain_text(name) for name in classes[:SHOWN_CLASSES])
    more = f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else ""
    yield f"Classes, in the order of the outputs: {shown}{more}."


def _training(known: CardFacts) -> Iterator[str]:
    facts, config = known.facts, known.description.config
    optim = config.get("optim", {})
    start = StartingPoint.of(str(config.get("model", {}).get("weights")), config.get("run", {}).get("init_from"))
    yield f"- recipe {config.get('recipe') or 'none'}; weights to begin with: {plain_text(str(start))}"
    yield (
        f"- {optim.get('opt')}, lr {optim.get('lr')}, global batch {facts.get('global_batch')}, "
        f"seed {facts.get('seed')}; {counted(facts.get('epochs', 0), 'epoch')}, the best was {known.description.epoch}"
    )
    for number, phase in enumerate(config.get("phase", []), 1):
        yield f"- phase {number}: learns {plain_text(str(phase.get('trainable')))}"
    if "seconds" in facts:
        yield f"- {facts['seconds'] / 60:.1f} minutes on {_machine(facts)}"
    versions = (facts.get("launches") or [{}])[-1].get("versions", {})
    yield f"- made with {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _machine(facts: Mapping[str, Any]) -> str:
    launch = (facts.get("launches") or [{}])[-1]
    hardware, processes = launch.get("hardware", {}), launch.get("processes", 1)
    device = (hardware.get("gpus") or [hardware.get("cpu")])[0] if launch.get("device") == "cuda" else None
    where = device or f"{hardware.get('cpu')} ({hardware.get('cores')} cores)"
    return f"{where}, {counted(processes, 'process')}, precision {launch.get('precision')}"


def _limits(known: CardFacts) -> Iterator[str]:
    metrics, classes = known.metrics, known.description.architecture.num_classes
    yield f"- It assigns one of {counted(classes, 'class')} to every image, even if the image shows none of them."
    yield "- The best epoch was chosen on the validation images, so unseen images may do a little worse."
    yield "- The interval is about other images like these, not about other cameras, places or times."
    if int(metrics["images"]) < 30 * classes:
        yield f"- {metrics['images']} validation images for {classes} classes are few: the intervals are wide."
    yield "- The rights to the images, and whether the model fits a purpose, were not checked."


# How to load it


def loading_with_torchvision(weights: str, architecture: Architecture, spec: Preprocessing) -> list[str]:
    """Code that labels photo.jpg with torch and torchvision alone, fenced; for plain networks."""
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
    """Code that labels photo.jpg with this package, fenced; for every network and every preprocessing."""
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


def run_card(known: CardFacts) -> str:
    """README.md of a finished run."""
    weights = "checkpoints/best.safetensors"
    made_of, spec = known.description.architecture, known.description.preprocessing
    lines = loading_with_ours(weights)
    if known.is_plain and spec.resize_mode != "pad":
        lines = [*loading_with_torchvision(weights, made_of, spec), "", *lines]
    lines += ["", "Without torch: `resnet-dist export` on this folder, then `resnet-dist predict`."]
    return card(known, weights, lines)
