"""`resnet-dist demo`: train, export and predict on scikit-learn's handwritten digits, offline."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config.fields import option, out_of_range


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a resnet18 on handwritten digits, export it and predict: offline, in a minute on two cores."""

    output_dir: str = option("resnet-dist-demo", "-o", "--output")
    """Folder for the images and the run."""
    full: bool = False
    """Train on images of 64 pixels instead of 32, and longer: a few minutes, about 99 % accuracy."""
    epochs: int | None = None
    """Number of epochs (default: 3; with --full 6)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 1, math.inf, "epochs")


def main(cfg: Config) -> int:
    """Run the demo, and print what it made. Returns the exit code."""
    from resnet_dist.training.demo import run_demo

    images, run = run_demo(Path(cfg.output_dir), cfg.full, cfg.epochs)
    print(
        f"\nMade: {run}/report.html, everything on one page;"
        f"\n      {run}/checkpoints/best.safetensors, which torchvision and timm can load;"
        f"\n      {run}/plots: curves, confusion matrix, samples, predictions; {run}/eval/val/predictions.csv;"
        f"\n      {run}/export: model.onnx and predict.py, which need no torch; {run}/digits.png"
        f"\nNext: resnet-dist predict {run} {images}/7"
        "\n      resnet-dist train YOUR_FOLDER --recipe discriminative   (one sub-folder per class)"
    )
    return 0
