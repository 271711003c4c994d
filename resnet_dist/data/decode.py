"""One image of a table, decoded by the predictor's own code, with errors that name the file."""

from pathlib import Path

from PIL import Image

from export.predict import ImageError, decode
from resnet_dist.data.index import ImageTable
from resnet_dist.errors import DataError


def load_image(table: ImageTable, index: int) -> Image.Image:
    """Image number `index` of `table`, upright RGB. Raises DataError with the path where it cannot be used."""
    path = table.root / table.paths[index]
    return load_file(path)


def load_file(path: Path) -> Image.Image:
    """An image file, upright RGB. Raises DataError with the path where it cannot be used."""
    try:
        return decode(path)
    except ImageError as error:
        raise DataError(f"{path}: {error}; remove or replace it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from None
