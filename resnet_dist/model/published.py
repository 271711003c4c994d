"""What the publisher of weights says of them: network, classes, preprocessing, licence, name on the Hub."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision

from export.predict import FILTERS, Preprocessing
from resnet_dist.config.schema import ARCHITECTURES, ModelConfig
from resnet_dist.errors import ArtifactError
from resnet_dist.files.header import description_in
from resnet_dist.files.reading import parse_json, read_bounded
from resnet_dist.files.weights_file import CONFIG, HUB, WEIGHTS, located
from resnet_dist.model.weights import named_weights, preprocessing_in, preprocessing_of, sha256_of

MAX_CONFIG = 1 << 26  # bytes; a config.json with 100,000 class names has a tenth
PLAIN = {"global_pool": "avg", "in_chans": 3}  # what timm's model_args may say
CROP_MODES = {"center": "crop", "squash": "squash", "border": "pad"}  # timm's name: our name


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is said of weights; None for what is not said.

    Attributes:
        by: who says it, such as "config.json"; "" if nobody says anything.
        base_model: the repository with these weights on the Hugging Face Hub.
    """

    by: str = ""
    model: str | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    license: str | None = None
    base_model: str | None = None

    def line(self, source: str, spec: Preprocessing) -> str:
        """How the images are prepared, and why, for the plan of a training."""
        if self.preprocessing is None:
            why = f"assumed: {source} does not say how its images were prepared"
        else:
            why = f"from {self.by}" + ("" if spec == self.preprocessing else ", changed by the settings")
        return f"preprocessing: {in_words(spec)} ({why})"


def in_words(spec: Preprocessing) -> str:
    """A preprocessing in one line."""
    size = f"{spec.resize} px cropped to {spec.img_size}" if spec.resize_mode == "crop" else f"{spec.img_size} px"
    means, stds = (" ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
    return f"{spec.resize_mode} {size}, {spec.interpolation}, mean {means}, std {stds}"


def of_settings(cfg: ModelConfig) -> Published:
    """What is said of the weights in the settings of a training. Raises UsageError, ArtifactError, MachineError."""
    if cfg.weights == "none":
        return Published()
    named = named_weights(cfg)
    return of_torchvision(named) if named is not None else of_source(cfg.weights)


def of_source(source: str) -> Published:
    """What is said of the weights file, folder or repository that a text names. A missing file says nothing.

    In this order: resnet-dist in the file itself, a config.json of timm next to it, torchvision if the file is one of
    theirs. Raises ArtifactError, UsageError, MachineError.
    """
    file = located(source)
    config = file.with_name(CONFIG)
    if not file.is_file():
        return Published()
    if file.suffix == ".safetensors" and description_in(file) is not None:
        return Published(by="the checkpoint", preprocessing=preprocessing_in(file))
    if file.name in WEIGHTS and config.is_file():
        return of_timm(config, source.removeprefix(HUB) if source.startswith(HUB) else None)
    return next(map(of_torchvision, _same_file(file)), Published())


def _same_file(file: Path) -> list[torchvision.models.WeightsEnum]:
    """torchvision's weights whose file this is: the name of the download has the start of its sha256."""
    every = [weights for name in ARCHITECTURES for weights in torchvision.models.get_model_weights(name)]
    prefixes = {weights: Path(weights.url).stem.rpartition("-")[2] for weights in every}
    digest = sha256_of(file)
    return [weights for weights, prefix in prefixes.items() if digest.startswith(prefix)]


def of_torchvision(weights: torchvision.models.WeightsEnum) -> Published:
    """What torchvision says of its weights. It names no licence. The Hub has the same weights among timm's."""
    name = next(name for name in ARCHITECTURES if weights in set(torchvision.models.get_model_weights(name)))
    tag = "tv2_in1k" if weights.name == "IMAGENET1K_V2" else "tv_in1k"
    return Published(
        by=f"torchvision's {weights}",
        model=name,
        classes=tuple(weights.meta["categories"]),
        preprocessing=preprocessing_of(weights),
        base_model=f"timm/{name}.{tag}",
    )


def of_timm(config: Path, repository: str | None = None) -> Published:
    """What a config.json of timm says; nothing if it is another library's. Raises ArtifactError."""
    values = _json_object(config)
    cfg = values.get("pretrained_cfg")
    if not isinstance(cfg, dict):
        return Published()
    name = str(values.get("architecture")).partition(".")[0]
    if name not in ARCHITECTURES:
        raise ArtifactError(f"{config}: cannot build {name}; the architecture must be in {', '.join(ARCHITECTURES)}")
    others = values.get("model_args") or {}
    if not isinstance(others, dict):
        raise ArtifactError(f"{config}: model_args must be a JSON object")
    unlike = [key for key, value in others.items() if key != "num_classes" and PLAIN.get(key, ...) != value]
    if unlike:
        raise ArtifactError(f"{config}: cannot build a {name} with {unlike[0]} {others[unlike[0]]!r}")
    try:
        spec = _preprocessing_of_timm(cfg)
    except (ValueError, KeyError, TypeError, OverflowError, ZeroDivisionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{config}: its pretrained_cfg cannot be used: {reason}") from None
    labels = values.get("label_names") or cfg.get("label_names")
    stated = cfg.get("license")
    return Published(
        by=str(config),
        model=name,
        classes=tuple(map(str, labels)) if isinstance(labels, list) else None,
        preprocessing=spec,
        license=stated if isinstance(stated, str) and stated not in ("", "unknown") else None,
        base_model=repository or cfg.get("hf_hub_id") or None,
    )


def _json_object(file: Path) -> Mapping[str, Any]:
    try:
        values = parse_json(read_bounded(file, MAX_CONFIG))
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ArtifactError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{file}: must be a JSON object")
    return values


def _preprocessing_of_timm(cfg: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing with which timm's `create_transform` gives the same pixels in evaluation.

    timm resizes the short side to floor(size / crop_pct). Raises KeyError, TypeError, ValueError.
    """
    channels, height, width = cfg["input_size"]
    mode, interpolation = cfg.get("crop_mode") or "center", cfg["interpolation"]
    if channels != 3 or height != width:
        raise ValueError(f"input_size must be 3 channels of a square, not {cfg['input_size']}")
    if mode not in CROP_MODES or interpolation not in FILTERS:
        raise ValueError(f"crop_mode {mode!r} with interpolation {interpolation!r} is not supported")
    resize = math.floor(height / cfg["crop_pct"])
    if mode != "center" and resize != height:
        raise ValueError(f"crop_pct must be 1 with crop_mode {mode}, not {cfg['crop_pct']}")
    mean, std = tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"]))
    spec = Preprocessing(
        img_size=height,
        resize_mode=CROP_MODES[mode],
        resize=resize,
        interpolation=interpolation,
        mean=mean,  # type: ignore[arg-type]
        std=std,  # type: ignore[arg-type]
        fill=tuple(round(255 * value) for value in mean),  # type: ignore[arg-type]
    )
    return Preprocessing.from_dict(spec.to_dict())  # checks the ranges
