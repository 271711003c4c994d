"""Images of a table as a report shows them, each decoded once."""

from pathlib import Path

import numpy as np
from PIL import Image

from export.predict import Preprocessing, decoded, fit
from resnet_dist.data.index import ImageTable

SIDE = 128  # pixels of the long side of a thumbnail


def thumbnail(image: Image.Image) -> Image.Image:
    """The image, made smaller in place: at most 128 pixels a side."""
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    return image


class Pictures:
    """The images of a table as a network sees them, and thumbnails of whatever image was decoded.

    Attributes:
        thumbnails: by file.
    """

    def __init__(self, table: ImageTable, spec: Preprocessing) -> None:
        self.table, self.spec = table, spec
        self.thumbnails: dict[Path, Image.Image] = {}
        self._fitted: dict[int, np.ndarray] = {}

    def keep(self, file: Path, image: Image.Image) -> None:
        """Keep a thumbnail of a decoded image, which is made smaller in place."""
        self.thumbnails[file] = thumbnail(image)

    def fitted(self, position: int) -> np.ndarray:
        """The image in the evaluation geometry, uint8 (img_size, img_size, 3).

        Raises DataError, with the path, if it cannot be used.
        """
        from resnet_dist.data.decode import naming_the_file  # which imports torch, and reports shall not need that

        if position not in self._fitted:
            file = self.table.path(position)
            with naming_the_file(self.table, position), decoded(file) as image:
                self._fitted[position] = fit(image, self.spec)
                self.keep(file, image)
        return self._fitted[position]
