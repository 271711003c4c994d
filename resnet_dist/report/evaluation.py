"""An evaluation on disk: predictions.csv first, and from the same records every metric and picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.predict import Preprocessing
from resnet_dist.data.decode import load_fitted
from resnet_dist.data.index import ImageTable
from resnet_dist.evaluate.metrics import confusion, headline, per_class
from resnet_dist.evaluate.records import Records
from resnet_dist.report import plots
from resnet_dist.run_folder import to_csv, to_json, write_atomically
from resnet_dist.wording import shortened

GRID = 16


def write_evaluation(
    folder: Path, plots_folder: Path, table: ImageTable, records: Records, classes: Sequence[str], spec: Preprocessing
) -> dict[str, float]:
    """predictions.csv, per_class.csv, metrics.json into `folder`, pictures into `plots_folder`; gives the headline."""
    folder.mkdir(parents=True, exist_ok=True)
    plots_folder.mkdir(parents=True, exist_ok=True)
    metrics = headline(records)
    write_atomically(folder / "predictions.csv", predictions_csv(table, records, classes))
    table_of_classes = per_class(records, classes)
    rows = [list(row.values()) for row in table_of_classes]
    write_atomically(folder / "per_class.csv", to_csv(list(table_of_classes[0]), rows))
    write_atomically(folder / "metrics.json", to_json({"images": len(records), **metrics}))
    plots.confusion_matrix(plots_folder / "confusion_matrix.png", confusion(records, classes), classes)
    prediction_grid(plots_folder / "predictions.png", table, records, classes, spec)
    return metrics


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
    chosen = np.unique(np.linspace(0, len(table) - 1, GRID).round().astype(int))
    images = [load_fitted(table, int(i), spec) for i in chosen]
    names = [shortened(name, 22) for name in classes]
    titles = [
        f"{names[records.prediction[i]]} ({records.probabilities[i, 0]:.2f})\ntrue: {names[records.target[i]]}"
        for i in chosen
    ]
    plots.image_grid(file, images, titles, [bool(records.prediction[i] == records.target[i]) for i in chosen])
