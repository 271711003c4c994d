"""Where the evidence for a prediction lies in the images of the highest losses, as small pictures."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from export.predict import Preprocessing
from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.data.loader import EvalImages
from resnet_dist.data.transforms import ToInput
from resnet_dist.errors import DataError
from resnet_dist.evaluation.explain import grad_cam
from resnet_dist.report.explanations import overlay
from resnet_dist.report.on_disk import Evaluation
from resnet_dist.report.page_content import top_losses
from resnet_dist.report.pictures import SIDE, data_address


def grad_cam_overlays(model: nn.Module, evaluation: Evaluation, spec: Preprocessing) -> dict[int, str]:
    """For the top losses of an evaluation, by position: Grad-CAM of the predicted class over the image, as an address.

    Images that are gone or cannot be read any more are left out.
    """
    device = next(model.parameters()).device
    targets = evaluation.records.target
    images = EvalImages(ImageTable(evaluation.root, PathTable(evaluation.paths), targets), spec)
    found = {position: images.__getitems__([position]) for position in top_losses(evaluation.records)}
    batches = {position: batch for position, batch in found.items() if not isinstance(batch, DataError)}
    if not batches:
        return {}
    inputs = torch.cat([ToInput(spec, device)(batch.to(device)) for batch in batches.values()])
    predicted = torch.from_numpy(evaluation.records.prediction[list(batches)]).to(device)
    heats = grad_cam(model, inputs, predicted).cpu().numpy()
    return {
        position: _picture(np.asarray(batch.images[0]), heat)
        for (position, batch), heat in zip(batches.items(), heats, strict=True)
    }


def _picture(image: np.ndarray, heat: np.ndarray) -> str:
    drawn = Image.fromarray(overlay(image, heat))
    drawn.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    return data_address(drawn)
