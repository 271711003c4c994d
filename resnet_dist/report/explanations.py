"""Write explanations: every image next to its saliency overlay, a table, and one sheet of the first images."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from resnet_dist.errors import MachineError
from resnet_dist.files.outputs import Kind, make_folder, table_with
from resnet_dist.files.run import to_csv, write_atomically
from resnet_dist.report import plots
from resnet_dist.report.overlays import overlay
from resnet_dist.runtime.wording import shortened

ON_SHEET = 24
COLUMNS = ("file", "path", "target", "prediction", "probability", "explained")
EXPLANATIONS = Kind("a folder of explanations", "explained.csv", table_with(*COLUMNS))


@dataclass(frozen=True)
class Explanation:
    """The saliency map of one image.

    Attributes:
        source: the path of the image.
        image: uint8 (H, W, 3), as the network sees it.
        heat: float32 (H, W) in 0..1, the saliency for `explained`.
        prediction, probability: the predicted class and its probability (0..1).
        target: the label, or "" if it is unknown.
        explained: the class that the map explains.
    """

    source: str
    image: np.ndarray
    heat: np.ndarray
    prediction: str
    probability: float
    target: str
    explained: str


def write_explanations(folder: Path, explanations: list[Explanation]) -> None:
    """Write explained.csv, one PNG per image (the image, then its overlay), and sheet.png with the first 24 images.

    The pictures of an earlier call are removed; other files stay. Raises UsageError, MachineError.
    """
    make_folder(folder, EXPLANATIONS)
    remove_pictures(folder)
    names = [f"{number:03d}-{Path(one.source).stem[:80]}.png" for number, one in enumerate(explanations, 1)]
    rows = [
        [name, one.source, one.target, one.prediction, one.probability, one.explained]
        for name, one in zip(names, explanations, strict=True)
    ]
    write_atomically(folder / EXPLANATIONS.mark, to_csv(COLUMNS, rows))
    for name, one in zip(names, explanations, strict=True):
        stream = io.BytesIO()
        Image.fromarray(np.concatenate([one.image, overlay(one.image, one.heat)], axis=1)).save(stream, "PNG")
        write_atomically(folder / name, stream.getvalue())
    write_sheet(folder / "sheet.png", explanations[:ON_SHEET])


def remove_pictures(folder: Path) -> None:
    """Remove the pictures that the explained.csv of an earlier call lists. Raises MachineError."""
    try:
        with (folder / EXPLANATIONS.mark).open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            named = {row["file"] for row in csv.DictReader(stream)}
        for file in folder.glob("*.png"):
            if file.name in named and not file.is_symlink():
                file.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written ({error.strerror})") from None


def write_sheet(file: Path, explanations: list[Explanation]) -> None:
    """Draw pairs of image and overlay, two pairs per row."""
    tiles, titles, right = [], [], []
    for one in explanations:
        tiles += [one.image, overlay(one.image, one.heat)]
        label = f"\ntrue: {shortened(one.target, 22)}" if one.target else ""
        titles += [f"{shortened(one.prediction, 22)} ({one.probability:.2f}){label}"]
        titles += [f"for {shortened(one.explained, 22)}"]
        right += [one.target in ("", one.prediction)] * 2
    plots.image_grid(file, tiles, titles, right)
