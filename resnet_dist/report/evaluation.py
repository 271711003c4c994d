"""An evaluation on disk: predictions.csv first, and from the same records every metric and picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.predict import Preprocessing, fit
from resnet_dist.data.decode import load_image
from resnet_dist.data.index import ImageTable
from resnet_dist.evaluate.metrics import confusion, headline, per_class
from resnet_dist.evaluate.records import Records
from resnet_dist.report import plots
from resnet_dist.run_folder import to_json, write_atomically
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
    write_atomically(folder / "per_class.csv", _csv(per_class(records, classes)))
    write_atomically(folder / "metrics.json", to_json({"images": len(records), **metrics}))
    plots.confusion_matrix(plots_folder / "confusion_matrix.png", confusion(records, classes), classes)
    prediction_grid(plots_folder / "predictions.png", table, records, classes, spec)
    return metrics


def predictions_csv(table: ImageTable, records: Records, classes: Sequence[str]) -> str:
    """One line per image: path,target,prediction,loss,top1..topk,p1..pk, classes by name, each number the shortest
    decimal that is its float32."""
    k = records.classes.shape[1]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    ranks = range(1, k + 1)
    writer.writerow(["path", "target", "prediction", "loss", *(f"top{i}" for i in ranks), *(f"p{i}" for i in ranks)])
    for row, path in enumerate(table.paths):
        best = [classes[c] for c in records.classes[row]]
        values = [str(p) for p in records.probabilities[row]]
        writer.writerow([path, classes[records.target[row]], best[0], str(records.loss[row]), *best, *values])
    return stream.getvalue()


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def prediction_grid(
    file: Path, table: ImageTable, records: Records, classes: Sequence[str], spec: Preprocessing
) -> None:
    """Images spread evenly over the table with their predicted and true names, as the network sees them."""
    chosen = np.unique(np.linspace(0, len(table) - 1, GRID).round().astype(int))
    images = [fit(load_image(table, int(i)), spec) for i in chosen]
    names = [shortened(name, 22) for name in classes]
    titles = [
        f"{names[records.prediction[i]]} ({records.probabilities[i, 0]:.2f})\ntrue: {names[records.target[i]]}"
        for i in chosen
    ]
    plots.image_grid(file, images, titles, [bool(records.prediction[i] == records.target[i]) for i in chosen])
