"""`resnet-dist demo`: the whole job on scikit-learn's handwritten digits, offline."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config.fields import option
from resnet_dist.config.schema import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PreprocessConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from resnet_dist.errors import MachineError, UsageError
from resnet_dist.files.run import RunFolder, is_run, read_facts

if TYPE_CHECKING:
    import numpy as np

SIDE = 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a resnet18 on scikit-learn's handwritten digits, export and use it: offline, two minutes on two cores."""

    output_dir: str = option("resnet-dist-demo", "-o", "--output")
    """Folder for the images and the run."""
    epochs: int = 6
    """Epochs."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.epochs < 1:
            yield f"--epochs {self.epochs}: must be at least 1"


def main(cfg: Config) -> int:
    """Write the images, train on them, and say what was made. Returns the exit code."""
    from resnet_dist.training.run import run_training

    folder = Path(cfg.output_dir)
    images, run = folder / "digits", folder / "run"
    RunFolder(run).check("any" if is_of_demo(run, images) else "nothing")
    print(f"writing 1,797 scans of handwritten digits to {images}")
    write_digits(images)
    run_training(settings(images, run, cfg.epochs))
    export_and_predict(images, run)
    print(
        f"\nMade: {run}/report.html, everything on one page;"
        f"\n      {run}/checkpoints/best.safetensors, which torchvision and timm load as it is;"
        f"\n      {run}/plots: curves, confusion matrix, samples, predictions; {run}/eval/val/predictions.csv;"
        f"\n      {run}/export: model.onnx and predict.py, which need no torch; {run}/digits.png"
        f"\nNext: resnet-dist predict {run} {images}/7"
        "\n      resnet-dist train YOUR_FOLDER --recipe discriminative   (one sub-folder per class)"
    )
    return 0


def is_of_demo(run: Path, images: Path) -> bool:
    """Whether a run is one of an earlier demo, which this one may replace."""
    return is_run(run) and read_facts(run).get("data_root") == str(images.absolute())


def export_and_predict(images: Path, run: Path) -> None:
    """Export and verify the best checkpoint, and label ten digits with the exported file."""
    from export.predict import WRITERS, Predictor, save_grid
    from export.run import ExportConfig, run_export

    print("\nexporting to ONNX")
    bundle = run_export(ExportConfig(run=str(run)))
    few = [str(min((images / str(digit)).iterdir())) for digit in range(10)]
    print("\npredicting ten digits with onnxruntime alone")
    predictor = Predictor(bundle.model)
    predictions = list(predictor.predict(few, top_k=2))
    for prediction in (None, *predictions):  # None writes the header
        WRITERS["table"](sys.stdout, 2, prediction)
    save_grid(run / "digits.png", predictions, predictor)


def settings(images: Path, run: Path, epochs: int) -> TrainConfig:
    """The demo's training: SGD with a 1cycle schedule, no random changes (a flipped digit is another sign)."""
    return TrainConfig(
        data=DataConfig(data=str(images), batch_size=64),
        preprocess=PreprocessConfig(img_size=SIDE, resize=SIDE),
        augment=AugmentConfig(aug="none"),
        model=ModelConfig(model="resnet18", weights="none"),
        optim=OptimConfig(opt="sgd", lr=0.05),
        schedule=ScheduleConfig(sched="onecycle"),
        run=dataclasses.replace(RunConfig(), epochs=epochs, output_dir=str(run), overwrite=True),
    )


def write_digits(folder: Path) -> None:
    """The 8x8 scans, 16 grey levels, as PNG files in one folder per digit.

    Raises UsageError where another file has the name of one, MachineError where they cannot be written.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = {
        folder / str(digit) / f"{number:04d}.png": (pixels * 255 / 16).round().astype(np.uint8)
        for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True))
    }
    for file, pixels in images.items():
        if os.path.lexists(file) and not holds(file, pixels):
            raise UsageError(f"{file}: it exists and is not an image of the demo; choose another --output-dir")
    try:
        for file, pixels in images.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                Image.fromarray(pixels).save(file)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written ({error.strerror})") from None


def holds(file: Path, pixels: "np.ndarray") -> bool:
    """Whether a file is a PNG image of just these pixels, uint8 (H, W)."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            return np.array_equal(np.asarray(image), pixels)
    except OSError:
        return False
