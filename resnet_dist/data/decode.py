"""Decode the images of a table exactly as the predictor does. Errors name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from PIL import Image

from export.predict import (
    ORIENTATION,
    ImageError,
    Preprocessing,
    decode,
    decoded,
    file_of,
    fit,
    opened,
    to_rgb,
    upright,
)
from resnet_dist.data.index import ImageTable
from resnet_dist.errors import DataError

# Deprecated since torchvision 0.29 in favour of another package. Without it, Pillow gives the same pixels.
DECODE_JPEG = getattr(torchvision.io, "decode_jpeg", None)


@contextmanager
def naming_the_file(table: ImageTable, index: int) -> Iterator[None]:
    """Inside this context, errors about image number `index` of `table` become a DataError with its path."""
    try:
        yield
    except ImageError as error:
        raise DataError(f"{table.path(index)}: {error}; remove or replace it") from None
    except OSError as error:
        raise DataError(f"{table.path(index)}: cannot be opened ({error.strerror})") from None


def load_image(table: ImageTable, index: int) -> Image.Image:
    """Image number `index`, upright RGB. Raises DataError if it cannot be used."""
    with naming_the_file(table, index):
        return decode(table.path(index))


def load_fitted(table: ImageTable, index: int, spec: Preprocessing) -> np.ndarray:
    """Image number `index` in the evaluation geometry, uint8 (img_size, img_size, 3). Raises DataError."""
    with naming_the_file(table, index), decoded(table.path(index)) as image:
        return fit(image, spec)


def load_whole(table: ImageTable, index: int, least: int = 0) -> np.ndarray:
    """Image number `index`, upright, uint8 (H, W, 3): the pixels of `load_image`, faster. Raises DataError.

    With `least`, a JPEG whose short side has at least 2, 4 or 8 times that many pixels is decoded at a half, a quarter
    or an eighth of its size.
    """
    with naming_the_file(table, index), file_of(table.path(index)) as file:
        data = file.read()
        pixels = scaled_jpeg_pixels(data, least) if least else None
        if pixels is None:
            pixels = jpeg_pixels(data)
        return np.asarray(decode(data)) if pixels is None else pixels


@dataclass(frozen=True)
class Reader:
    """The decoded images of a table by position.

    Attributes:
        table: which images.
        spec: the evaluation geometry to resize and crop to; None for whole images.
        least: for whole images, see `load_whole`.
    """

    table: ImageTable
    spec: Preprocessing | None
    least: int = 0

    def __call__(self, index: int) -> np.ndarray:
        """Image number `index`, uint8 (H, W, 3). Raises DataError."""
        if self.spec is None:
            return load_whole(self.table, index, self.least)
        return load_fitted(self.table, index, self.spec)


def jpeg_pixels(data: bytes) -> np.ndarray | None:
    """An ordinary JPEG by torchvision's decoder, uint8 (H, W, 3); None if the predictor's decoder has to decode it.

    Both use libjpeg-turbo and give the same pixels; torchvision's is a sixth faster. Raises ImageError, as
    `export.predict.opened` does.
    """
    if DECODE_JPEG is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    with opened(data) as image:
        if image.format != "JPEG" or image.mode not in ("RGB", "L") or image.getexif().get(ORIENTATION, 1) != 1:
            return None
    try:
        pixels: torch.Tensor = DECODE_JPEG(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB")
    except RuntimeError:  # damaged: the other decoder reads it or says what is wrong
        return None
    return pixels.permute(1, 2, 0).numpy()


def scaled_jpeg_pixels(data: bytes, least: int) -> np.ndarray | None:
    """A large JPEG at a half, a quarter or an eighth of its size, upright; None for other files.

    The short side keeps at least `least` pixels. Scaling happens in libjpeg's inverse DCT, which saves most of the
    work: four times as fast for 12 megapixels. Raises ImageError.
    """
    with opened(data) as image:
        scale = jpeg_scale(image.size, least)
        if image.format != "JPEG" or scale == 1:
            return None
        image.draft(None, (image.width // scale, image.height // scale))
        image.load()
        return np.asarray(to_rgb(upright(image)))


def jpeg_scale(size: tuple[int, int], least: int) -> int:
    """The largest of 1, 2, 4, 8 by which a size can be divided so that its short side keeps `least` pixels."""
    return max(scale for scale in (1, 2, 4, 8) if scale == 1 or min(size) >= scale * least)
