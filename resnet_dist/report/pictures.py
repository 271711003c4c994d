"""Small pictures as `data:` addresses, as many as a page has room for."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from export.predict import ImageError, decode
from resnet_dist.runtime import environment as launcher

SIDE = 128  # pixels of the long side
ROOM = 9_000_000  # characters of all pictures of a page together
BATCH = 64


def data_address(image: Image.Image, quality: int = 72) -> str:
    """The image as a JPEG in a `data:` address."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def thumbnail(file: Path) -> str:
    """An upright copy of at most 128 pixels a side, or "" where the file is gone or cannot be read any more."""
    try:
        image = decode(file)
    except (ImageError, OSError):
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    return data_address(image)


def thumbnails(files: Sequence[Path], room: int = ROOM) -> list[str]:
    """One address per file, in order, until `room` characters are used up; "" for those that follow.

    A pool of threads decodes them: Pillow works without the interpreter's lock.
    """
    found: list[str] = []
    with ThreadPoolExecutor(launcher.cores()) as pool:
        for start in range(0, len(files), BATCH):
            found += pool.map(thumbnail, files[start : start + BATCH])
            if sum(map(len, found)) > room:
                break
    ends = np.cumsum([len(address) for address in found])
    kept = [address if end <= room else "" for address, end in zip(found, ends.tolist(), strict=True)]
    return kept + [""] * (len(files) - len(kept))
