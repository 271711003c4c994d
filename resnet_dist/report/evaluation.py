"""Write an evaluation as files: tables, plots and page."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnet_dist.errors import MachineError
from resnet_dist.evaluation.metrics import confused_pairs
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.files.outputs import Kind, json_with
from resnet_dist.files.run import to_csv, to_json, write_atomically
from resnet_dist.runtime.wording import shortened

if TYPE_CHECKING:
    from resnet_dist.evaluation.evidence import Evidence

EVALUATION = Kind("an evaluation", "metrics.json", json_with("images", "top1", "loss", "intervals"))
CONFUSED = ("target", "prediction", "images", "share_of_target")


def write_evaluation_report(folder: Path, evaluation: Evaluation, evidence: "Mapping[int, Evidence]") -> None:
    """Write the tables, the plots and report.html of an evaluation into `folder`. Raises MachineError, DataError."""
    from resnet_dist.report.page import write_evaluation_page

    write_evaluation(folder, evaluation)
    plot_evaluation(folder, evaluation)
    write_evaluation_page(folder / "report.html", evaluation, evidence)


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write the tables and numbers of an evaluation into `folder`.

    The files are metrics.json, predictions.csv, per_class.csv, confused.csv and, if the records have features,
    embeddings.npy: float32 (n, F) in the order of predictions.csv. Raises MachineError.
    """
    make_folder(folder)
    # This file comes first, because it marks the folder as an evaluation.
    write_atomically(folder / EVALUATION.mark, to_json(evaluation.summary))
    write_atomically(folder / "predictions.csv", predictions_csv(evaluation))
    write_atomically(folder / "per_class.csv", table_csv(evaluation.per_class))
    pairs = confused_pairs(evaluation.confusion, evaluation.classes)
    write_atomically(folder / "confused.csv", table_csv(pairs, CONFUSED))
    if evaluation.records.features is not None:
        stream = io.BytesIO()
        np.save(stream, evaluation.records.features, allow_pickle=False)
        write_atomically(folder / "embeddings.npy", stream.getvalue())


def plot_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Draw the plots of an evaluation into `folder`: confusion matrix, reliability, embeddings, sample predictions.

    Raises MachineError, DataError.
    """
    plot_numbers(folder, evaluation)
    prediction_grid(folder / "predictions.png", evaluation)


def plot_numbers(folder: Path, evaluation: Evaluation) -> None:
    """Draw the plots of an evaluation that show no images. Raises MachineError."""
    from resnet_dist.report import plots  # it imports matplotlib, which takes a second

    make_folder(folder)
    records, classes = evaluation.records, evaluation.classes
    plots.confusion_matrix(folder / "confusion_matrix.png", evaluation.confusion, classes)
    plots.reliability_diagram(folder / "reliability.png", evaluation.reliability)
    if records.features is not None:
        plots.embedding_map(folder / "embeddings.png", records.features, records.target, classes)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises MachineError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be created ({error.strerror})") from None


def table_csv(rows: Sequence[Mapping[str, object]], header: Sequence[str] = ()) -> str:
    """Rows with the same keys as CSV; `header` is for a table that may be empty."""
    return to_csv(header or list(rows[0]), [list(row.values()) for row in rows])


def predictions_csv(evaluation: Evaluation) -> str:
    """One line per image: path,target,prediction,loss,top1..topk,p1..pk. Classes are given by name, and each number by
    the shortest decimal that is its float32."""
    records, classes = evaluation.records, evaluation.classes
    ranks = range(1, records.classes.shape[1] + 1)
    header = ["path", "target", "prediction", "loss", *(f"top{i}" for i in ranks), *(f"p{i}" for i in ranks)]
    rows = []
    for row, path in enumerate(evaluation.paths):
        best = [classes[c] for c in records.classes[row]]
        values = [str(p) for p in records.probabilities[row]]
        rows.append([path, classes[records.target[row]], best[0], records.loss[row], *best, *values])
    return to_csv(header, rows)


def prediction_grid(file: Path, evaluation: Evaluation) -> None:
    """Draw 16 evenly spread images as the network sees them, with their predicted and true classes."""
    from resnet_dist.report import plots

    records = evaluation.records
    chosen = evaluation.samples
    images = [evaluation.pictures.fitted(position) for position in chosen]
    names = [shortened(name, 22) for name in evaluation.classes]
    titles = [
        f"{names[records.prediction[i]]} ({records.probabilities[i, 0]:.2f})\ntrue: {names[records.target[i]]}"
        for i in chosen
    ]
    plots.image_grid(file, images, titles, [bool(records.prediction[i] == records.target[i]) for i in chosen])
