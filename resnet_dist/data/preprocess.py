"""The preprocessing of a run: that of its weights, with what the config changes."""

from export.predict import Preprocessing
from resnet_dist.config import PreprocessConfig


def preprocessing(cfg: PreprocessConfig, base: Preprocessing | None = None) -> Preprocessing:
    """The preprocessing of the weights (ImageNet's usual one if none is named), with what the config changes."""
    base = base or Preprocessing()
    img_size = cfg.img_size or base.img_size
    resize = cfg.resize or round(base.resize * img_size / base.img_size)
    mean, std = (cfg.mean or base.mean), (cfg.std or base.std)
    return Preprocessing(
        img_size=img_size,
        resize_mode=cfg.resize_mode,
        resize=resize if cfg.resize_mode == "crop" else img_size,
        interpolation=cfg.interpolation,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        fill=(round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2])),
    )
