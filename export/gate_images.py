"""The images on which an export is verified, and those on which int8 is calibrated."""

from pathlib import Path

import numpy as np
from PIL import Image

from export.predict import normalise
from export.run import MIN_CALIBRATION, ExportConfig
from resnet_dist.config.fields import required
from resnet_dist.data.decode import load_fitted
from resnet_dist.data.index import ImageTable, PathTable, read_part, read_run_part
from resnet_dist.errors import DataError, UsageError
from resnet_dist.model.checkpoint import Description


def gate_images(cfg: ExportConfig, description: Description, folder: Path) -> tuple[ImageTable, str]:
    """The images to verify on, and their source: "given", "validation" or "synthetic".

    They are the validation images of --data or of the run. A checkpoint without either is verified on synthetic images,
    which are written to `folder`. Raises UsageError, DataError.
    """
    if cfg.data is not None:
        return read_part(Path(cfg.data), "val", description.classes), "given"
    run = Path(required(cfg.run, "RUN"))
    if run.is_dir():
        return read_run_part(run, "val", description.classes), "validation"
    return synthetic_images(folder), "synthetic"


def calibration_inputs(cfg: ExportConfig, description: Description) -> list[np.ndarray]:
    """Evenly spread training images as inputs of the graph. Raises UsageError or DataError if there are too few.

    uint8 (S, S, 3) if the graph normalises, otherwise float32 (3, S, S).
    """
    run = Path(required(cfg.run, "RUN"))
    if cfg.data is not None:
        table = read_part(Path(cfg.data), "train", description.classes)
    elif run.is_dir():
        table = read_run_part(run, "train", description.classes)
    else:
        raise UsageError("--int8 needs training images to calibrate on: give --data")
    if len(table) < MIN_CALIBRATION:
        raise DataError(
            f"--int8 needs at least {MIN_CALIBRATION} training images to calibrate on; there are only {len(table)}"
        )
    chosen = table.spread(cfg.calibration_images)
    spec = description.preprocessing
    pixels = [load_fitted(table, i, spec) for i in chosen]
    if cfg.preprocess_in_graph:
        return pixels
    return [np.ascontiguousarray(normalise(image, spec).transpose(2, 0, 1)) for image in pixels]


def synthetic_images(folder: Path, count: int = MIN_CALIBRATION) -> ImageTable:
    """PNG files with noise and gradients in many sizes: they can compare pipelines but cannot measure accuracy."""
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = (int(n) for n in random.integers(40, 500, 2))
        ramp = np.linspace(0, 255, width)[None, :, None] * random.random(3)
        noise = random.normal(0, 40, (height, width, 3))
        Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")
    names = sorted(file.name for file in folder.iterdir())
    return ImageTable(folder, PathTable(names), np.zeros(count, np.int64))
