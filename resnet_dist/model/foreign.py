"""Load a classifier that resnet-dist did not write: weights of torchvision, timm or another trainer."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from resnet_dist.config.foreign import IMAGENET, TORCHVISION, WORDNET, ForeignConfig
from resnet_dist.errors import ArtifactError, UsageError
from resnet_dist.files.header import description_in
from resnet_dist.files.reading import parse_json, read_bounded
from resnet_dist.model.checkpoint import MAX_CLASSES, MAX_NAME, Description, load_checkpoint
from resnet_dist.model.published import Published, in_words, of_source, of_timm, of_torchvision
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.model.weights import check_finite, check_fit, fitting, read_tensors

MAX_LIST = MAX_CLASSES * MAX_NAME


def load_model(file: Path, asked: ForeignConfig) -> tuple[nn.Module, Description]:
    """The model of a checkpoint of resnet-dist or of foreign weights, in evaluation mode on the CPU.

    Nothing is unpickled, and nothing about preprocessing or classes is guessed. Raises ArtifactError, and UsageError if
    an option is missing or does not fit.
    """
    own = file.suffix == ".safetensors" and file.is_file() and description_in(file) is not None
    if own and any(asked.given()):
        raise UsageError(
            f"{' '.join(asked.given())}: {file} was written by resnet-dist and contains this; leave it out"
        )
    return load_checkpoint(file) if own or not file.exists() else load_foreign(file, asked)


def load_foreign(file: Path, asked: ForeignConfig) -> tuple[nn.Module, Description]:
    """The model and its description, from the weights, their publisher and the options. Raises as `load_model`."""
    said = of_source(str(file))
    tensors = read_tensors(file)
    name = asked.model or said.model
    if name is None:
        raise UsageError(f"--model is missing: {file} does not name its network{fitting(tensors)}")
    if "conv1.weight" in tensors and tensors["conv1.weight"].shape[2:] == (3, 3):
        raise ArtifactError(f"{file}: its first convolution is 3x3; the network must have torchvision's stem (7x7)")
    if "fc.weight" not in tensors or tensors["fc.weight"].ndim != 2:
        raise ArtifactError(f"{file}: no classifier of a {name} (fc.weight is missing or no matrix)")
    count = tensors["fc.weight"].shape[0]
    architecture = Architecture(
        name=name, stem="standard", head="linear", head_hidden=(), dropout=0.0, num_classes=count
    )
    model = build(architecture)
    check_fit(model.state_dict(), tensors, f"{file}: does not fit {name}")
    check_finite(tensors, str(file))
    model.load_state_dict(dict(tensors), strict=False)  # older files lack num_batches_tracked
    classes, named_by = classes_of(asked, said, file, count)
    prepared = said if asked.preprocessing is None else preprocessing_from(asked.preprocessing)
    spec = prepared.preprocessing
    if spec is None:
        raise UsageError(
            f"--preprocessing is missing: {file} does not say how its images are prepared; give "
            f"{' or '.join(TORCHVISION)} for torchvision's ways, or a config.json of timm"
        )
    origin = {"file": file.name, "classes": named_by, "preprocessing": prepared.by}
    return model.eval(), Description(
        architecture=architecture,
        classes=classes,
        preprocessing=spec,
        config={},
        epoch=0,
        score={},
        weights_kind="raw",
        origin=origin | {"license": said.license or "not stated"},
    )


def origin_lines(description: Description) -> list[str]:
    """Where the parts of a foreign model come from, for the terminal; nothing for a checkpoint of resnet-dist."""
    origin = description.origin
    if origin is None:
        return []
    return [
        f"{origin['file']}: {description.architecture.name}, {len(description.classes)} classes from "
        f"{origin['classes']}, licence {origin['license']}",
        f"preprocessing: {in_words(description.preprocessing)} (from {origin['preprocessing']})",
    ]


def preprocessing_from(text: str) -> Published:
    """What --preprocessing names. Raises UsageError, ArtifactError."""
    if text in TORCHVISION:
        return replace(of_torchvision(torchvision.models.ResNet50_Weights[text]), by=f"--preprocessing {text}")
    file = Path(text)
    if not file.is_file():
        raise UsageError(f"--preprocessing {text}: must be {', '.join(TORCHVISION)} or a config.json of timm")
    said = of_timm(file)
    if said.preprocessing is None:
        raise UsageError(f"--preprocessing {text}: a JSON file without pretrained_cfg, not a config.json of timm")
    return said


def classes_of(asked: ForeignConfig, said: Published, file: Path, count: int) -> tuple[tuple[str, ...], str]:
    """The names of the `count` classes, and who gives them. Raises UsageError."""
    option = f"--classes {asked.classes}" if asked.classes is not None else said.by
    names = said.classes if asked.classes is None else _named_by(asked.classes)
    if names is None:
        raise UsageError(
            f"--classes is missing: {file} does not name its {count} classes; give a file with one name per line"
            + (f", or {IMAGENET}" if count == 1000 else "")
        )
    if len(names) != count:
        raise UsageError(f"{option}: {len(names)} names, but {file} has {count} outputs (fc.weight)")
    bad = [name for name, times in Counter(names).items() if times > 1 or not name or len(name) > MAX_NAME]
    if bad:
        raise UsageError(f"{option}: the class name {bad[0]!r} is empty, too long or given twice")
    return names, option


def _named_by(text: str) -> tuple[str, ...]:
    if text == IMAGENET:
        return tuple(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    if text == WORDNET:
        return _wordnet_ids()
    try:
        content = read_bounded(Path(text), MAX_LIST).decode("utf-8-sig")
        names: Any = parse_json(content) if content.lstrip().startswith("[") else content.splitlines()
    except OSError as error:
        hint = f"; must be {IMAGENET}, {WORDNET} or a file"
        raise UsageError(f"--classes {text}: cannot be read ({error.strerror}){hint}") from None
    except ValueError as error:
        raise UsageError(f"--classes {text}: neither lines of text nor a JSON list ({error})") from None
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"--classes {text}: the JSON list must contain names")
    return tuple(name.strip() for name in names)


def _wordnet_ids() -> tuple[str, ...]:
    """The WordNet ids of the 1000 ImageNet classes, which are the usual names of their folders, from timm's list."""
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError:
        raise UsageError(f"--classes {WORDNET} needs timm's list: pip install timm") from None
    names: list[str] = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    return tuple(names)
