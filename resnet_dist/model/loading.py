"""Load a trained network in Python: a plain torch module, its class names and its preprocessing."""

import os
from pathlib import Path
from typing import NamedTuple

from torch import nn

from export.predict import Preprocessing
from resnet_dist.errors import python_errors
from resnet_dist.model.checkpoint import load_checkpoint as read


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        model: the network in evaluation mode on the CPU; float32 (B, 3, img_size, img_size) to logits (B, classes).
        classes: the class names, in the order of the logits.
        preprocessing: how an image is converted to the input of the network.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Load a checkpoint (.safetensors), or the best checkpoint of a Run or run folder.

    Nothing is unpickled. Raises ArtifactError if the checkpoint is missing, damaged or not from resnet-dist.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "checkpoints" / "best.safetensors"
    with python_errors():
        model, description = read(file)
    return Checkpoint(model, description.classes, description.preprocessing)
