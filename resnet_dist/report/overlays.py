"""Where the evidence for a prediction is, drawn over the image."""

import numpy as np
from matplotlib import colormaps
from PIL import Image

from resnet_dist.data.pictures import thumbnail
from resnet_dist.report.pictures import data_address


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image, uint8 (H, W, 3), under its map of evidence, (H, W) in 0..1: the stronger the evidence, the more colour
    covers the image. uint8 (H, W, 3)."""
    colours = colormaps["turbo"](heat)[..., :3] * 255
    share = 0.7 * np.sqrt(heat)[..., None]
    grey = image.mean(axis=2, keepdims=True)
    return np.asarray(np.clip((1 - share) * (0.5 * image + 0.5 * grey) + share * colours, 0, 255).round(), np.uint8)


def overlay_address(image: np.ndarray, heat: np.ndarray) -> str:
    """The same as a small picture in a `data:` address."""
    return data_address(thumbnail(Image.fromarray(overlay(image, heat))))
