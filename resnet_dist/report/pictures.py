"""Small pictures for a page as `data:` URLs, up to a total size."""

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

ROOM = 9_000_000  # characters for all pictures of a page
BATCH = 64


def data_address(image: Image.Image, quality: int = 72) -> str:
    """The image as a JPEG in a `data:` URL."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def picture(file: Path, thumbnails: Mapping[Path, Image.Image]) -> str:
    """The thumbnail of a file as a `data:` URL, from `thumbnails` or decoded; "" if the file cannot be read."""
    if file in thumbnails:
        return data_address(thumbnails[file])
    try:
        return data_address(thumbnail(decode(file)))
    except (ImageError, OSError):
        return ""


def pictures(files: Sequence[Path], thumbnails: Mapping[Path, Image.Image], room: int = ROOM) -> list[str]:
    """One URL per file, in order, until `room` characters are used; "" for the remaining files.

    `thumbnails`: existing thumbnails by file. Threads decode the other files: Pillow releases the interpreter's lock.
    """
    urls: list[str] = []
    with ThreadPoolExecutor(launcher.cores()) as pool:
        for start in range(0, len(files), BATCH):
            urls += pool.map(lambda file: picture(file, thumbnails), files[start : start + BATCH])
            if sum(map(len, urls)) > room:
                break
    ends = np.cumsum([len(url) for url in urls])
    embedded = [url if end <= room else "" for url, end in zip(urls, ends.tolist(), strict=True)]
    return embedded + [""] * (len(files) - len(embedded))
