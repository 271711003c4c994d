"""Read the files of a finished run for `report RUN`. Errors name the file."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.predict import Preprocessing
from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.errors import ArtifactError
from resnet_dist.evaluation.metrics import Measured
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.reliability import reliability
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.files.run import read_facts


def read_run_evaluation(run: Path, classes: Sequence[str], spec: Preprocessing) -> Evaluation:
    """The evaluation of a run's best checkpoint on its validation images. Raises UsageError, ArtifactError."""
    root = Path(str(read_facts(run).get("data_root")))
    return read_evaluation(run / "eval" / "val", root, "val", classes, spec)


def read_evaluation(folder: Path, root: Path, split: str, classes: Sequence[str], spec: Preprocessing) -> Evaluation:
    """Read the evaluation in a folder. Raises ArtifactError if there is none, or if its classes differ."""
    file = folder / "predictions.csv"
    rows = read_csv(file)
    with understood(file):
        paths, records = [row["path"] for row in rows], records_in(rows, classes)
    file = folder / "metrics.json"
    values = read_json(file)
    with understood(file):
        intervals = values.pop("intervals")
        metrics = {name: Measured(values.pop(name), *interval) for name, interval in intervals.items()}
        del values["images"]
    return Evaluation(
        model=Path(str(values.get("model", ""))),
        table=ImageTable(root, PathTable(paths), records.target),
        split=split,
        classes=tuple(classes),
        spec=spec,
        records=with_features(records, folder / "embeddings.npy"),
        metrics=metrics,
        reliability=reliability(records),
        facts=values,
        folder=folder,
    )


def records_in(rows: Sequence[dict[str, str]], classes: Sequence[str]) -> Records:
    """The records in the rows of predictions.csv. Raises KeyError for an unknown class, ValueError for a bad number."""
    number = {name: index for index, name in enumerate(classes)}
    k = min(5, len(classes))
    best = [[number[row[f"top{i + 1}"]] for i in range(k)] for row in rows]
    return Records(
        target=np.array([number[row["target"]] for row in rows], np.int64),
        loss=np.array([row["loss"] for row in rows], np.float32),
        classes=np.array(best, np.int64).reshape(-1, k),
        probabilities=np.array([[row[f"p{i + 1}"] for i in range(k)] for row in rows], np.float32).reshape(-1, k),
    )


def with_features(records: Records, file: Path) -> Records:
    """Add the features that `eval --embeddings` wrote, if there are any. Raises ArtifactError."""
    if not file.exists():
        return records
    try:
        features = np.load(file, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file}: damaged ({error}); `resnet-dist eval --embeddings` writes it") from None
    if features.ndim != 2 or len(features) != len(records):
        raise ArtifactError(f"{file}: must have one row per image of predictions.csv; evaluate again")
    return replace(records, features=features)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The facts of a run that its curves and its page show in addition to the evaluation.

    Attributes:
        path: the run folder.
        facts: run.json.
        epochs: the rows of metrics.csv; an empty cell is NaN.
        steps: the rows of metrics.jsonl: the learning rates of every logged optimizer step.
        training_images: the number of training images of each class.
        label_errors: the rows of label_errors.csv, or None if `label-errors` was not run.
        texts: (name, text) of config.toml and command.txt.
    """

    path: Path
    facts: Mapping[str, Any]
    epochs: list[dict[str, float]]
    steps: list[dict[str, Any]]
    training_images: Mapping[str, int]
    label_errors: list[dict[str, str]] | None
    texts: list[tuple[str, str]]


def read_run_record(run: Path, training_images: Mapping[str, int] | None = None) -> RunRecord:
    """Read the record of a run. Without `training_images`, they are counted in the manifest of the run.

    Raises UsageError, ArtifactError.
    """
    by_epoch, by_step, labels = run / "metrics.csv", run / "metrics.jsonl", run / "label_errors.csv"
    with understood(by_epoch):
        epochs = [{name: float(value or "nan") for name, value in row.items()} for row in read_csv(by_epoch)]
    with understood(by_step):
        steps = [json.loads(line) for line in read_text(by_step).splitlines()]
    if training_images is None:
        rows = read_csv(run / "data" / "manifest.csv")
        training_images = Counter(row["label"] for row in rows if row["split"] == "train")
    return RunRecord(
        path=run,
        facts=read_facts(run),
        epochs=epochs,
        steps=steps,
        training_images=training_images,
        label_errors=read_csv(labels) if labels.exists() else None,
        texts=[(name, read_text(run / name)) for name in ("config.toml", "command.txt") if (run / name).exists()],
    )


@contextmanager
def understood(file: Path) -> Iterator[None]:
    """Inside this context, an error about the content of a file becomes an ArtifactError with its path."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{file}: damaged, or from another run ({reason}); create it again") from None


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
        values = json.loads(read_text(file))
    except (ValueError, RecursionError):
        raise ArtifactError(f"{file}: damaged, not JSON; evaluate again") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{file}: damaged, not a JSON object; evaluate again")
    return values


def read_text(file: Path) -> str:
    """The text of a file. Raises ArtifactError."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None
