"""Images of a table, decoded by the predictor's own code, with errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from export.predict import ImageError, Preprocessing, decode, fit
from resnet_dist.data.index import ImageTable
from resnet_dist.errors import DataError


@contextmanager
def naming_the_file(table: ImageTable, index: int) -> Iterator[None]:
    """Within it, what is wrong with image number `index` of `table` is raised as a DataError with its path."""
    try:
        yield
    except ImageError as error:
        raise DataError(f"{table.root / table.paths[index]}: {error}; remove or replace it") from None
    except OSError as error:
        raise DataError(f"{table.root / table.paths[index]}: cannot be opened ({error.strerror})") from None


def load_image(table: ImageTable, index: int) -> Image.Image:
    """Image number `index`, upright RGB. Raises DataError with the path where it cannot be used."""
    with naming_the_file(table, index):
        return decode(table.root / table.paths[index])


def load_fitted(table: ImageTable, index: int, spec: Preprocessing) -> np.ndarray:
    """Image number `index` in the evaluation geometry, uint8 (img_size, img_size, 3). Raises DataError."""
    with naming_the_file(table, index):
        return fit(decode(table.root / table.paths[index]), spec)
