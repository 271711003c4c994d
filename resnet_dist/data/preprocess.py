"""The preprocessing of a run: the preprocessing of its weights with the changes of the config."""

from export.predict import Preprocessing
from resnet_dist.config.schema import PreprocessConfig
from resnet_dist.errors import UsageError


def settings_of(spec: Preprocessing) -> PreprocessConfig:
    """The settings that give this preprocessing with all weights."""
    return PreprocessConfig(
        img_size=spec.img_size,
        resize=spec.resize if spec.resize_mode == "crop" else None,
        resize_mode=spec.resize_mode,  # type: ignore[arg-type]
        interpolation=spec.interpolation,  # type: ignore[arg-type]
        mean=spec.mean,
        std=spec.std,
    )


def preprocessing(cfg: PreprocessConfig, base: Preprocessing | None = None) -> Preprocessing:
    """The preprocessing of the weights (`base`, default: ImageNet's), with the changes of the config.

    Raises UsageError if the changes do not fit the weights.
    """
    base = base or Preprocessing()
    img_size = cfg.img_size or base.img_size
    mode = cfg.resize_mode or base.resize_mode
    if cfg.resize is not None and mode != "crop":
        raise UsageError(f"--resize needs --resize-mode crop, and these weights have {mode}")
    resize = cfg.resize or round(base.resize * img_size / base.img_size)
    if mode == "crop" and resize < img_size:
        raise UsageError(
            f"--resize {resize} is smaller than the image size {img_size} of the weights: the crop would not fit"
        )
    mean, std = (cfg.mean or base.mean), (cfg.std or base.std)
    return Preprocessing(
        img_size=img_size,
        resize_mode=mode,
        resize=resize if mode == "crop" else img_size,
        interpolation=cfg.interpolation or base.interpolation,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        fill=(round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2])),
    )
