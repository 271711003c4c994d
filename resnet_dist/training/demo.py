"""The demo: scikit-learn's handwritten digits from image files to an exported model, offline."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from resnet_dist.config.schema import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Phase,
    PreprocessConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from resnet_dist.errors import MachineError, UsageError
from resnet_dist.files.run import RunFolder, is_run, read_facts
from resnet_dist.runtime.display import Display
from resnet_dist.training.run import run_training


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained: the side of the images in pixels, the training settings that go with it, and what learns."""

    side: int
    epochs: int
    batch_size: int
    lr: float
    trainable: str


# At 32 pixels, layer4 sees one pixel per image, and the gradient of its 3x3 convolutions takes half the time of a step
# on a CPU. They stay random; its 1x1 convolution and its BatchNorm learn.
SHORT = Size(side=32, epochs=3, batch_size=32, lr=0.02, trainable="all -layer4.*.conv*")
FULL = Size(side=64, epochs=6, batch_size=64, lr=0.05, trainable="all")


def run_demo(folder: Path, full: bool = False, epochs: int | None = None) -> tuple[Path, Path]:
    """Write the images into `folder`, train on them, export and predict. Returns the folders of images and run.

    `full` trains longer on larger images. `epochs` replaces the number of epochs.

    Raises ResnetDistError: UsageError if `folder` holds files of something else.
    """
    images, run = folder / "digits", folder / "run"
    RunFolder(run).check("any" if is_of_demo(run, images) else "nothing")
    display = Display(enabled=True)
    print(f"writing 1,797 scans of handwritten digits to {images}")
    with display.busy("writing images"):
        write_digits(images)
    run_training(settings(images, run, FULL if full else SHORT, epochs))
    export_and_predict(images, run, display)
    return images, run


def is_of_demo(run: Path, images: Path) -> bool:
    """Whether a run was made by an earlier demo, and may be replaced."""
    return is_run(run) and read_facts(run).get("data_root") == str(images.absolute())


def export_and_predict(images: Path, run: Path, display: Display) -> None:
    """Export and verify the best checkpoint, and predict ten digits with the exported model."""
    from export.predict import WRITERS, Predictor, save_grid
    from export.run import ExportConfig, run_export

    print("\nexporting to ONNX")
    with display.busy("verifying the exported model against PyTorch", prints=True):
        bundle = run_export(ExportConfig(run=str(run)))
    few = [str(min((images / str(digit)).iterdir())) for digit in range(10)]
    print("\npredicting ten digits with onnxruntime alone")
    predictor = Predictor(bundle.model)
    predictions = list(predictor.predict(few, top_k=2))
    for prediction in (None, *predictions):  # None writes the header
        WRITERS["table"](sys.stdout, 2, prediction)
    save_grid(run / "digits.png", predictions, predictor)


def settings(images: Path, run: Path, size: Size, epochs: int | None = None) -> TrainConfig:
    """The demo's training: SGD with a 1cycle schedule, no augmentation (a mirrored digit is no longer that digit)."""
    return TrainConfig(
        data=DataConfig(data=str(images), batch_size=size.batch_size),
        preprocess=PreprocessConfig(img_size=size.side, resize=size.side),
        augment=AugmentConfig(aug="none"),
        model=ModelConfig(model="resnet18", weights="none"),
        optim=OptimConfig(opt="sgd", lr=size.lr),
        schedule=ScheduleConfig(sched="onecycle"),
        phase=(Phase(trainable=size.trainable),),
        run=dataclasses.replace(RunConfig(), epochs=epochs or size.epochs, output_dir=str(run), overwrite=True),
    )


def write_digits(folder: Path) -> None:
    """Write the 8x8 scans with 16 grey levels as PNG files, in one folder per digit.

    Raises UsageError if a different file has one of the names, MachineError if the files cannot be written.
    """
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


def holds(file: Path, pixels: np.ndarray) -> bool:
    """Whether a file is a PNG image with exactly these pixels, uint8 (H, W)."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return np.array_equal(np.asarray(image), pixels)
    except OSError:
        return False
