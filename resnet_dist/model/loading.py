"""A trained network for Python callers: a plain torch module with the names of its classes and its preprocessing."""

import os
from pathlib import Path
from typing import NamedTuple

from torch import nn

from export.predict import Preprocessing
from resnet_dist.errors import python_errors
from resnet_dist.model.checkpoint import load_checkpoint as read


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        model: the network in evaluation mode on the CPU; float32 (B, 3, img_size, img_size) to logits (B, classes).
        classes: the class names, in the order of the logits.
        preprocessing: how an image becomes the input of the network.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Load a checkpoint (.safetensors), or the best one of a Run or run folder.

    Nothing is unpickled. Raises ArtifactError if there is no such checkpoint, or it is damaged or foreign.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "checkpoints" / "best.safetensors"
    with python_errors():
        model, description = read(file)
    return Checkpoint(model, description.classes, description.preprocessing)
