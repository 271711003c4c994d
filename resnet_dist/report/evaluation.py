"""An evaluation on disk: predictions.csv first, and from the same records every metric and picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from export.predict import Preprocessing
from resnet_dist.data.decode import load_fitted
from resnet_dist.data.index import ImageTable
from resnet_dist.errors import MachineError
from resnet_dist.evaluation.metrics import Measured, confused_pairs, confusion, measured, per_class
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.reliability import reliability
from resnet_dist.files.outputs import Kind, json_with
from resnet_dist.files.run import to_csv, to_json, write_atomically
from resnet_dist.runtime.wording import shortened

EVALUATION = Kind("an evaluation", "metrics.json", json_with("images", "top1", "loss", "intervals"))
GRID = 16
CONFUSED = ("target", "prediction", "images", "share_of_target")


def write_evaluation(
    folder: Path,
    table: ImageTable,
    records: Records,
    classes: Sequence[str],
    facts: Mapping[str, Any] = MappingProxyType({}),
    judged: Records | None = None,
) -> dict[str, Measured]:
    """Write the tables and numbers of an evaluation into `folder`; returns the headline metrics.

    predictions.csv, per_class.csv, confused.csv, metrics.json (with `facts` on how it was evaluated); embeddings.npy,
    float32 (n, F) in the order of predictions.csv, where features were kept. Numbers about losses and probabilities are
    those of `judged`, where these images were used to calibrate: the same records, cross-fitted. Raises MachineError.
    """
    judged = judged or records
    make_folder(folder)
    metrics, counts = measured(judged), confusion(records, classes)
    values = {name: metric.value for name, metric in metrics.items()}
    intervals = {name: [metric.low, metric.high] for name, metric in metrics.items()}
    write_atomically(  # first: by it the folder is known as an evaluation
        folder / EVALUATION.mark, to_json({"images": len(records), **values, "intervals": intervals, **facts})
    )
    write_atomically(folder / "predictions.csv", predictions_csv(table, records, classes))
    write_atomically(folder / "per_class.csv", table_csv(per_class(records, classes)))
    write_atomically(folder / "confused.csv", table_csv(confused_pairs(counts, classes), CONFUSED))
    if records.features is not None:
        stream = io.BytesIO()
        np.save(stream, records.features, allow_pickle=False)
        write_atomically(folder / "embeddings.npy", stream.getvalue())
    return metrics


def plot_evaluation(
    folder: Path,
    table: ImageTable,
    records: Records,
    classes: Sequence[str],
    spec: Preprocessing,
    judged: Records | None = None,
) -> None:
    """Draw the plots of an evaluation into `folder`: confusion matrix, reliability, sample predictions, embeddings.

    `judged`: see write_evaluation. Raises MachineError, DataError.
    """
    from resnet_dist.report import plots  # with matplotlib: only who draws waits for it

    make_folder(folder)
    plots.confusion_matrix(folder / "confusion_matrix.png", confusion(records, classes), classes)
    plots.reliability_diagram(folder / "reliability.png", reliability(judged or records))
    prediction_grid(folder / "predictions.png", table, records, classes, spec)
    if records.features is not None:
        plots.embedding_map(folder / "embeddings.png", records.features, records.target, classes)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises MachineError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made into a folder ({error.strerror})") from None


def table_csv(rows: Sequence[Mapping[str, object]], header: Sequence[str] = ()) -> str:
    """Rows of equal keys as CSV; `header` is for a table that may have none."""
    return to_csv(header or list(rows[0]), [list(row.values()) for row in rows])


def predictions_csv(table: ImageTable, records: Records, classes: Sequence[str]) -> str:
    """One line per image: path,target,prediction,loss,top1..topk,p1..pk, classes by name, each number the shortest
    decimal that is its float32."""
    ranks = range(1, records.classes.shape[1] + 1)
    header = ["path", "target", "prediction", "loss", *(f"top{i}" for i in ranks), *(f"p{i}" for i in ranks)]
    rows = []
    for row, path in enumerate(table.paths):
        best = [classes[c] for c in records.classes[row]]
        values = [str(p) for p in records.probabilities[row]]
        rows.append([path, classes[records.target[row]], best[0], records.loss[row], *best, *values])
    return to_csv(header, rows)


def prediction_grid(
    file: Path, table: ImageTable, records: Records, classes: Sequence[str], spec: Preprocessing
) -> None:
    """Images spread evenly over the table with their predicted and true names, as the network sees them."""
    from resnet_dist.report import plots

    chosen = np.unique(np.linspace(0, len(table) - 1, GRID).round().astype(int))
    images = [load_fitted(table, int(i), spec) for i in chosen]
    names = [shortened(name, 22) for name in classes]
    titles = [
        f"{names[records.prediction[i]]} ({records.probabilities[i, 0]:.2f})\ntrue: {names[records.target[i]]}"
        for i in chosen
    ]
    plots.image_grid(file, images, titles, [bool(records.prediction[i] == records.target[i]) for i in chosen])
