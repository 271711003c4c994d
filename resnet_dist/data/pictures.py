"""The images that a report shows, each decoded once."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image

from export.predict import ImageError, Preprocessing, decoded, fit
from resnet_dist.data.index import ImageTable

SIDE = 128  # pixels of the long side of a thumbnail
MOST_KEPT = 2_000  # a data set of at most this many images has all its thumbnails in memory, 64 KiB each


def thumbnail(image: Image.Image) -> Image.Image:
    """Shrink the image in place to at most 128 pixels a side, and return it."""
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    return image


class Pictures:
    """Some images of a table as the network sees them, and a thumbnail of every image that was decoded.

    Attributes:
        thumbnails: the thumbnails by file.
    """

    def __init__(self, table: ImageTable, spec: Preprocessing, shown: Iterable[int] = ()) -> None:
        """`shown`: positions of images that a report shows as the network sees them, which `keep` remembers."""
        self.table, self.spec = table, spec
        self.thumbnails: dict[Path, Image.Image] = {}
        self._shown = {table.path(position): position for position in shown}
        self._fitted: dict[int, np.ndarray] = {}
        self._lock = Lock()

    def keep(self, file: Path, image: Image.Image) -> None:
        """Keep what a report needs of a decoded RGB image, so it is not decoded again. Shrinks `image` in place."""
        position = self._shown.get(file)
        if position is not None and position not in self._fitted:
            with suppress(ImageError):  # `fitted` raises it with the path
                self._fitted[position] = fit(image, self.spec)
        self.thumbnails[file] = thumbnail(image)

    def fitted(self, position: int) -> np.ndarray:
        """The image in the evaluation geometry, uint8 (img_size, img_size, 3).

        Raises DataError, with the path, if it cannot be used.
        """
        from resnet_dist.data.decode import naming_the_file  # it imports torch, which a report without images can avoid

        with self._lock:  # two threads that need the same image decode it once
            if position not in self._fitted:
                file = self.table.path(position)
                with naming_the_file(self.table, position), decoded(file) as image:
                    self._fitted[position] = fit(image, self.spec)
                    self.keep(file, image)
            return self._fitted[position]
