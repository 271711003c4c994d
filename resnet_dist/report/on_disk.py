"""An evaluation as it lies on disk, and the other files that a page is made from, read with errors that name them."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.errors import ArtifactError
from resnet_dist.evaluation.records import Records
from resnet_dist.files.run import read_facts


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it lies on disk.

    Attributes:
        folder: holds predictions.csv and metrics.json.
        root: where the paths of its images start.
        split: "train", "val" or "test".
        paths: of the images, n of them, in the order of `records`.
    """

    folder: Path
    root: Path
    split: str
    classes: tuple[str, ...]
    paths: list[str]
    records: Records


def read_run_evaluation(run: Path, classes: Sequence[str]) -> Evaluation:
    """The evaluation of a run's best checkpoint on its validation images. Raises UsageError, ArtifactError."""
    root = Path(str(read_facts(run).get("data_root")))
    return read_evaluation(run / "eval" / "val", root, "val", classes)


def read_evaluation(folder: Path, root: Path, split: str, classes: Sequence[str]) -> Evaluation:
    """The evaluation in a folder. Raises ArtifactError where there is none, or it is not of these classes."""
    file = folder / "predictions.csv"
    number = {name: index for index, name in enumerate(classes)}
    k = min(5, len(classes))
    rows = read_csv(file)
    with understood(file):
        best = [[number[row[f"top{i + 1}"]] for i in range(k)] for row in rows]
        records = Records(
            target=np.array([number[row["target"]] for row in rows], np.int64),
            loss=np.array([row["loss"] for row in rows], np.float32),
            classes=np.array(best, np.int64).reshape(-1, k),
            probabilities=np.array([[row[f"p{i + 1}"] for i in range(k)] for row in rows], np.float32).reshape(-1, k),
        )
        return Evaluation(folder, root, split, tuple(classes), [row["path"] for row in rows], records)


@contextmanager
def understood(file: Path) -> Iterator[None]:
    """Within it, what does not fit together in a file is raised as an ArtifactError with its name."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{file}: damaged, or of another run ({reason}); make it anew") from None


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column. Raises ArtifactError."""
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}); `resnet-dist eval RUN` writes it") from None
    except csv.Error as error:
        raise ArtifactError(f"{file}: not a CSV file ({error})") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ArtifactError."""
    try:
        found = json.loads(read_text(file))
    except (ValueError, RecursionError):
        raise ArtifactError(f"{file}: damaged, not JSON; evaluate again") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{file}: damaged, not a JSON object; evaluate again")
    return found


def read_text(file: Path) -> str:
    """The text of a file. Raises ArtifactError."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
