"""Saliency maps for the images with the highest losses."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from export.predict import normalise
from resnet_dist.errors import DataError
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.evaluation.saliency import grad_cam


@dataclass(frozen=True)
class Evidence:
    """An image, uint8 (S, S, 3), and its saliency map, float32 (S, S) in 0..1."""

    image: np.ndarray
    heat: np.ndarray


def evidence_of(model: nn.Module, evaluation: Evaluation) -> dict[int, Evidence]:
    """Grad-CAM of the predicted class for the images with the highest losses, by position.

    Images that no longer exist or cannot be read are left out.
    """
    images: dict[int, np.ndarray] = {}
    for position in evaluation.top_losses:
        try:
            images[position] = evaluation.pictures.fitted(position)
        except DataError:
            continue
    if not images:
        return {}
    device = next(model.parameters()).device
    pixels = normalise(np.stack(list(images.values())), evaluation.spec)
    predicted = torch.from_numpy(evaluation.records.prediction[list(images)]).to(device)
    heats = grad_cam(model, torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device), predicted).cpu().numpy()
    return {position: Evidence(image, heat) for (position, image), heat in zip(images.items(), heats, strict=True)}
