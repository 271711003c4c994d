"""Small pictures as `data:` addresses, as many as a page has room for."""

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from export.predict import ImageError, decode
from resnet_dist.data.pictures import thumbnail
from resnet_dist.runtime import environment as launcher

ROOM = 9_000_000  # characters of all pictures of a page together
BATCH = 64


def data_address(image: Image.Image, quality: int = 72) -> str:
    """The image as a JPEG in a `data:` address."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def picture(file: Path, made: Mapping[Path, Image.Image]) -> str:
    """An upright copy of at most 128 pixels a side, of those that are made already or from the file; "" if the file is
    gone or cannot be read any more."""
    if file in made:
        return data_address(made[file])
    try:
        return data_address(thumbnail(decode(file)))
    except (ImageError, OSError):
        return ""


def pictures(files: Sequence[Path], made: Mapping[Path, Image.Image], room: int = ROOM) -> list[str]:
    """One address per file, in order, until `room` characters are used up; "" for the files after that.

    `made`: thumbnails by file, so that their images are not decoded again. A pool of threads decodes the others:
    Pillow works without the interpreter's lock.
    """
    found: list[str] = []
    with ThreadPoolExecutor(launcher.cores()) as pool:
        for start in range(0, len(files), BATCH):
            found += pool.map(lambda file: picture(file, made), files[start : start + BATCH])
            if sum(map(len, found)) > room:
                break
    ends = np.cumsum([len(address) for address in found])
    kept = [address if end <= room else "" for address, end in zip(found, ends.tolist(), strict=True)]
    return kept + [""] * (len(files) - len(kept))
