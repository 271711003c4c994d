"""The model to evaluate: the network of a checkpoint, or an exported model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from export.predict import Preprocessing
from resnet_dist.config.foreign import ForeignConfig
from resnet_dist.data.transforms import Batch, ToInput
from resnet_dist.evaluation.calibrate import Calibration, read_calibration
from resnet_dist.evaluation.exported import Exported, as_pixels
from resnet_dist.model.foreign import load_model, origin_lines
from resnet_dist.model.resnet import build
from resnet_dist.runtime.accelerate import model_from_main, on_main


@dataclass(frozen=True)
class Subject:
    """A network or an exported model, its preprocessing and its calibration.

    Attributes:
        file: the checkpoint or the exported model.
        model: maps the input to logits, float32 (B, classes).
        to_input: converts a batch of images to the input.
        calibration: temperature and thresholds, or None.
        notes: where the parts of a model come from that resnet-dist did not write.
    """

    file: Path
    model: nn.Module
    classes: tuple[str, ...]
    spec: Preprocessing
    to_input: Callable[[Batch], torch.Tensor]
    calibration: Calibration | None
    notes: Sequence[str] = ()

    @property
    def temperature(self) -> float:
        """The divisor of the logits before the softmax."""
        return self.calibration.temperature if self.calibration else 1.0


def load_network(
    accelerator: Accelerator, checkpoint: Path, foreign: ForeignConfig, calibrated: bool = True
) -> Subject:
    """Load the network of a checkpoint on every process, with its calibration if `calibrated`. `foreign` describes
    weights that resnet-dist did not write. Raises ArtifactError, UsageError.
    """
    model, description = model_from_main(
        accelerator, lambda: load_model(checkpoint, foreign), lambda described: build(described.architecture)
    )
    classes, spec = description.classes, description.preprocessing
    calibration = on_main(accelerator, lambda: read_calibration(checkpoint, len(classes)) if calibrated else None)
    to_input = ToInput(spec, accelerator.device)
    return Subject(checkpoint, model, classes, spec, to_input, calibration, origin_lines(description))


def load_exported(file: Path) -> Subject:
    """Load an exported model and the calibration in it. Raises ArtifactError."""
    model = Exported(str(file), torch.get_num_threads())
    metadata = model.predictor.metadata
    calibration = Calibration(
        checkpoint_sha256=metadata.get("checkpoint_sha256", ""),
        temperature=metadata["temperature"],
        thresholds=tuple(metadata.get("thresholds", ())),
        measured={},
    )
    return Subject(file, model, model.predictor.classes, model.predictor.preprocessing, as_pixels, calibration)
