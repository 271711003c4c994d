"""Synthetic photographs for measurements: as large as those of ImageNet, and as hard to decode."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from resnet_dist.errors import MachineError

DIFFERENT = 512  # even, so that a link is in the class of its file
SIZE = (500, 375)  # typical of ImageNet; with this noise a file has about 100 kB, ImageNet's mean


def photographs(folder: Path, count: int) -> None:
    """Write train/ and val/ folders of two classes with JPEG files, `count` of them in train. Raises MachineError.

    After the first `DIFFERENT`, files are hard links to these: making new ones would take longer than measuring.
    """
    random = np.random.default_rng(0)
    try:
        for number in range(count + 2):
            split, kind = ("train", number % 2) if number < count else ("val", number - count)
            file = folder / split / "ab"[kind] / f"{number:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            if DIFFERENT <= number < count:
                first = number % DIFFERENT
                os.link(folder / "train" / "ab"[first % 2] / f"{first:05d}.jpg", file)
                continue
            coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
            pixels = pixels + random.normal(0, 12, (SIZE[1], SIZE[0], 1)).astype(np.float32)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written ({error.strerror})") from None
