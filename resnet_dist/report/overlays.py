"""Draw saliency maps over images."""

import numpy as np
from matplotlib import colormaps
from PIL import Image

from resnet_dist.data.pictures import thumbnail
from resnet_dist.report.pictures import data_address


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Draw a saliency map, (H, W) in 0..1, over an image, uint8 (H, W, 3). Returns uint8 (H, W, 3).

    The higher the saliency, the more colour covers the image.
    """
    colours = colormaps["turbo"](heat)[..., :3] * 255
    share = 0.7 * np.sqrt(heat)[..., None]
    grey = image.mean(axis=2, keepdims=True)
    return np.asarray(np.clip((1 - share) * (0.5 * image + 0.5 * grey) + share * colours, 0, 255).round(), np.uint8)


def overlay_address(image: np.ndarray, heat: np.ndarray) -> str:
    """The overlay as a small picture in a `data:` URL."""
    return data_address(thumbnail(Image.fromarray(overlay(image, heat))))
