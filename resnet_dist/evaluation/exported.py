"""Evaluate an exported .onnx file like a network."""

import torch
from torch import nn

from export.predict import ModelError, Predictor
from resnet_dist.data.transforms import Batch
from resnet_dist.errors import ArtifactError


class Exported(nn.Module):
    """A module that computes logits in onnxruntime with the deployed predictor."""

    def __init__(self, file: str, threads: int) -> None:
        """Load the file. Raises ArtifactError."""
        super().__init__()
        try:
            self.predictor = Predictor(file, threads)
        except ModelError as error:
            raise ArtifactError(str(error)) from None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, img_size, img_size) to logits, float32 (B, classes), on the same device."""
        logits = self.predictor.logits(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        return torch.from_numpy(logits).to(images.device)


def as_pixels(batch: Batch) -> torch.Tensor:
    """The images of a batch as the input of `Exported`: uint8 (B, 3, S, S)."""
    return batch.images.permute(0, 3, 1, 2)
