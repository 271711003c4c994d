"""Test-time augmentation: average the probabilities over views of an image (Krizhevsky et al. 2012)."""

import torch
from torch import nn


def views_of(images: torch.Tensor, kind: str, size: int) -> list[torch.Tensor]:
    """Views (B, C, size, size) of images (B, C, S, S).

    "flip": the image (S equals `size`) and its mirror image. "crops": the centre crop at `round((S - size) / 2)`, the
    four corner crops, and the mirror images of these five.
    """
    images_and_mirrors = [images, images.flip(3)]
    if kind == "flip":
        return images_and_mirrors
    end = images.shape[3] - size
    places = [(round(end / 2), round(end / 2)), (0, 0), (0, end), (end, 0), (end, end)]
    return [part[:, :, y : y + size, x : x + size] for part in images_and_mirrors for y, x in places]


class Views(nn.Module):
    """A network that averages its probabilities over views of each image."""

    def __init__(self, model: nn.Module, kind: str, size: int, temperature: float) -> None:
        super().__init__()
        self.model, self.kind, self.size, self.temperature = model, kind, size, temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, S, S) to the logarithms of the mean probabilities, float32 (B, classes), which serve as logits."""
        logs = [
            (self.model(view).float() / self.temperature).log_softmax(1)
            for view in views_of(images, self.kind, self.size)
        ]
        return torch.stack(logs).logsumexp(0).log_softmax(1)
