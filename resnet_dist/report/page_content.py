"""The content of `report.html`: an evaluation, and the run that it belongs to."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from resnet_dist.evaluation import confident_learning
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.files.run import identity
from resnet_dist.report.on_disk import RunRecord, understood
from resnet_dist.report.pictures import pictures
from resnet_dist.runtime.wording import counted

MOST_LISTED = 20_000  # evaluated images that the page lists; those with the highest losses if there are more
MOST_JUDGED = 500  # labels per ranking that the page shows
MOST_PICTURED = 150  # labels per ranking that get a picture before other images do
MOST_PAIRS = 200
MOST_POINTS = 400  # per curve
MOST_DOTS = 2_000  # on the map
MATRIX = 120  # classes that the confusion matrix shows
CLASS_COLUMNS = ("class", "images", "precision", "recall", "F1", "most often confused with")
PER_CELL = 6  # pictures per cell of the confusion matrix before other images get one


@dataclass
class Images:
    """The images of a page, one row each: first the evaluated images, then those that other sections show."""

    root: Path
    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    rows: dict[tuple[str, str], int] = field(default_factory=dict)

    def row(self, split: str, path: str, target: int, record: tuple[int, float, float] = (-1, 0.0, 0.0)) -> int:
        """The row of an image; it is added if necessary. `record`: prediction (-1 for none), loss, confidence."""
        if (split, path) not in self.rows:
            self.rows[split, path] = len(self.rows)
            values = (path, split, target, record[0], _rounded(record[1]), _rounded(record[2]))
            for name, value in zip(
                ("path", "split", "target", "prediction", "loss", "confidence"), values, strict=True
            ):
                self.columns[name].append(value)
        return self.rows[split, path]

    def with_pictures(self, needed: Sequence[int], thumbnails: Mapping[Path, Image.Image]) -> dict[str, list[Any]]:
        """The columns and a column of pictures. Rows get a picture in the order of `needed`, up to the total size.

        `thumbnails`: existing thumbnails by file.
        """
        order = list(dict.fromkeys(needed))
        column = [""] * len(self.rows)
        urls = pictures([self.root / self.columns["path"][row] for row in order], thumbnails)
        for row, picture in zip(order, urls, strict=True):
            column[row] = picture
        return {**self.columns, "picture": column}


def evaluation_content(
    evaluation: Evaluation, run: RunRecord | None, data: Mapping[str, Any] | None, overlays: Mapping[int, str]
) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON values.

    `run`: the record of the run if this is the page of a run. `data`: the summary of `data.check` for all images of the
    run. `overlays`: saliency overlays by position in the evaluation.
    """
    records, classes = evaluation.records, evaluation.classes
    counts = evaluation.confusion
    images = Images(evaluation.root)
    listed = _worst_first(evaluation)[:MOST_LISTED]
    place = {position: _evaluated_row(images, evaluation, position) for position in listed.tolist()}
    worst = [place[position] for position in evaluation.top_losses]
    errors = [_evaluated_errors(evaluation, place)]
    errors += [_training_errors(run, images, classes)] if run else []
    pairs, pairs_note = _near_duplicates(data, images, classes) if run else (None, "")
    judged = [item[0] for part in errors for item in part["rows"][:MOST_PICTURED]]
    needed = [*worst, *judged, *(row for pair in pairs or [] for row in pair)]
    needed += [place[position] for position in _by_need(records, listed)]
    training = run.training_images if run else {}
    return {
        "classes": list(classes),
        "about": _about(evaluation, run),
        "headline": _headline(evaluation),
        "listed": len(listed),
        "images_note": _images_note(len(records), len(listed)),
        "images": images.with_pictures(needed, evaluation.pictures.thumbnails),
        "confusion": [[int(t), int(p), int(counts[t, p])] for t, p in np.argwhere(counts > 0)],
        "matrix": _matrix_classes(counts),
        "matrix_note": _matrix_note(counts),
        "class_columns": [*CLASS_COLUMNS, *(["training images"] if training else [])],
        "class_rows": _class_rows(evaluation, training),
        "top_losses": worst,
        "overlays": {place[position]: picture for position, picture in overlays.items()},
        "overlays_note": _overlays_note(bool(overlays)),
        "label_errors": errors,
        "near_duplicates": pairs,
        "duplicates_note": pairs_note,
        "curves": list(curves(run)) if run else [],
        "map": _map(evaluation, place),
        "data": _data_rows(data) if data else [],
        "facts": list(_flat(run.facts if run else evaluation.summary)),
        "texts": [list(text) for text in run.texts] if run else [],
    }


def _worst_first(evaluation: Evaluation) -> np.ndarray:
    """Positions: the top losses, then the other mistakes, then the rest, each by falling loss."""
    records = evaluation.records
    order = np.lexsort((-records.loss, records.prediction == records.target))
    return np.array(list(dict.fromkeys([*evaluation.top_losses, *order.tolist()])))


def _by_need(records: Records, listed: np.ndarray) -> list[int]:
    """Positions in the order in which they get a picture: a few per cell of the confusion matrix, then the others."""
    seen: Counter[tuple[int, int]] = Counter()
    first: list[int] = []
    later: list[int] = []
    cells = zip(records.target[listed].tolist(), records.prediction[listed].tolist(), strict=True)
    for position, cell in zip(listed.tolist(), cells, strict=True):
        seen[cell] += 1
        (first if seen[cell] <= PER_CELL else later).append(position)
    return first + later


def _evaluated_row(images: Images, evaluation: Evaluation, position: int) -> int:
    records = evaluation.records
    record = (
        int(records.prediction[position]),
        float(records.loss[position]),
        float(records.probabilities[position, 0]),
    )
    return images.row(evaluation.split, evaluation.paths[position], int(records.target[position]), record)


def _matrix_classes(counts: np.ndarray) -> list[int]:
    """The classes of the matrix in class order: all, or those with the most mistakes."""
    mistakes = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    return sorted(np.argsort(-mistakes, kind="stable")[:MATRIX].tolist())


def _matrix_note(counts: np.ndarray) -> str:
    """Which classes the matrix leaves out, and how many images with them; "" if it has all classes."""
    within = _matrix_classes(counts)
    left_out = len(counts) - len(within)
    if not left_out:
        return ""
    total, inside = int(counts.sum()), int(counts[np.ix_(within, within)].sum())
    return (
        f"The matrix has the {len(within)} of {len(counts):,} classes with the most mistakes. The other "
        f"{counted(left_out, 'class')} are listed below it: {total - inside:,} of {total:,} images have such a label "
        "or prediction. plots/confusion_matrix.png has all classes in a run, confused.csv every confusion. "
    )


def _class_rows(evaluation: Evaluation, training: Mapping[str, int]) -> list[list[Any]]:
    classes, others = evaluation.classes, evaluation.confusion.copy()
    np.fill_diagonal(others, 0)
    rows = []
    for number, row in enumerate(evaluation.per_class):
        other = int(others[number].argmax())
        confused = f"{classes[other]} ({others[number, other]})" if others[number, other] else None
        scores = [None if row[name] is None else _rounded(row[name]) for name in ("precision", "recall", "f1")]
        rows.append([row["class"], row["images"], *scores, confused, *([training[row["class"]]] if training else [])])
    return rows


def _map(evaluation: Evaluation, place: Mapping[int, int]) -> list[list[float]] | None:
    """[row, x, y] of listed images: the two principal components of their features; None without features."""
    features = evaluation.records.features
    if features is None or len(features) < 3:
        return None
    from sklearn.decomposition import PCA  # it takes seconds to import

    points = PCA(2, svd_solver="randomized", random_state=0).fit_transform(features)
    return [[place[at], _rounded(points[at, 0]), _rounded(points[at, 1])] for at in list(place)[:MOST_DOTS]]


# Label errors and near duplicates


def _evaluated_errors(evaluation: Evaluation, place: Mapping[int, int]) -> dict[str, Any]:
    title = f"Evaluated images ({evaluation.split})"
    if evaluation.split == "train":
        return {"title": title, "note": "The network learned these labels, so it cannot judge them.", "rows": []}
    errors = confident_learning.find_in_records(evaluation.records, len(evaluation.classes))
    ranked = errors.order.tolist() if errors.judge.can_tell else []
    rows = [
        [
            place[position],
            int(errors.likely[position]),
            _rounded(errors.quality[position]),
            bool(errors.suspected[position]),
        ]
        for position in ranked
        if position in place
    ]
    note = errors.judge.sentence(int(errors.suspected.sum()), "the network")
    if errors.judge.can_tell:
        note += " The quality of a label is low if another class is much more probable."
    return {"title": title, "note": note, "rows": rows[:MOST_JUDGED]}


def _training_errors(run: RunRecord, images: Images, classes: Sequence[str]) -> dict[str, Any]:
    if run.label_errors is None:
        note = f"Not checked yet. `resnet-dist label-errors {run.path}` checks them by cross-validation."
        return {"title": "Training images", "note": note, "rows": []}
    number, labels = {name: index for index, name in enumerate(classes)}, run.label_errors
    with understood(run.path / "label_errors.csv"):
        rows = [
            [
                images.row("train", row["path"], number[row["label"]]),
                number[row["likely"]],
                _rounded(float(row["quality"])),
                row["suspected"] == "1",
            ]
            for row in labels[:MOST_JUDGED]
        ]
        right = np.array([float(row["quality"]) >= 0.5 for row in labels])
        judge = confident_learning.Judge.of(right, np.array([number[row["label"]] for row in labels]))
    note = judge.sentence(sum(row["suspected"] == "1" for row in labels), confident_learning.OUT_OF_FOLD)
    return {"title": "Training images", "note": note, "rows": rows if judge.can_tell else []}


def _near_duplicates(
    data: Mapping[str, Any] | None, images: Images, classes: Sequence[str]
) -> tuple[list[list[int]], str]:
    """Pairs of rows that look alike, at least one of them a training image, and a sentence about them."""
    if data is None:
        return [], "Not checked, because there are many images. `resnet-dist report RUN` checks all of them."
    pairs = [[group[0], other] for group in data["duplicates"] for other in group[1:]] + data["near_duplicates"]
    pairs = [pair for pair in pairs if "train" in (pair[0]["split"], pair[1]["split"])]
    across = [
        pair for pair in pairs if pair[0]["split"] != pair[1]["split"]
    ]  # these come first: they make the score too good
    within = [pair for pair in pairs if pair[0]["split"] == pair[1]["split"]]
    number = {name: index for index, name in enumerate(classes)}
    rows = [
        [images.row(one["split"], one["path"], number[one["label"]]) for one in pair]
        for pair in (across + within)[:MOST_PAIRS]
    ]
    more = f"; the first {MOST_PAIRS} are shown" if len(pairs) > MOST_PAIRS else ""
    return rows, f"{counted(len(pairs), 'pair')} of images that look alike, {len(across)} of them across splits{more}."


def _data_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """(name, text) rows about the images, from the summary of `data.check`."""
    counts = {split: labels.values() for split, labels in data["per_class"].items()}
    rows = [
        [f"images in {split}", f"{sum(n)} of {len(n)} classes, {min(n)} to {max(n)} each"]
        for split, n in counts.items()
    ]
    side, ratio, crop = data["short_side"], data["aspect_ratio"], data["crop"]
    if side:
        rows.append(["short side", f"{side['min']} to {side['max']} pixels, median {side['median']}"])
        rows.append(["aspect ratio", f"median {ratio['median']:.2f}, at most {ratio['max']:.2f}"])
        rows.append(["cut off by the evaluation crop", f"{100 * crop['mean_share_cut']:.0f} % of the area on average"])
    for name in ("formats", "modes"):
        rows.append([name, ", ".join(f"{key} {count}" for key, count in sorted(data[name].items()))])
    rows.append(["rotated by Exif", str(data["rotated"])])
    for name in ("errors", "wrong_extension", "tiny"):
        rows.append([name.replace("_", " "), str(len(data[name]))])
    return [*rows, ["identical files under several labels", str(data["contradictions"])]]


# Curves


def curves(run: RunRecord) -> Iterator[dict[str, Any]]:
    """Charts of a run: losses and scores by epoch, learning rates by optimizer step. A value of None is a gap."""
    yield from _of_epochs(run.epochs)
    with understood(run.path / "metrics.jsonl"):
        steps = run.steps[:: max(1, len(run.steps) // MOST_POINTS)]
        names = dict.fromkeys(name for row in steps for name in row["lr"])
        series = [{"name": name, "points": [[row["step"], row["lr"].get(name)] for row in steps]} for name in names]
    yield {"title": "Learning rate", "x": "optimizer step", "log": True, "phases": [], "series": series}


def _of_epochs(epochs: Sequence[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    phases = [row["epoch"] - 0.5 for before, row in pairwise(epochs) if row["phase"] != before["phase"]]
    for title, metric in (("Loss", "loss"), ("Top-1 accuracy", "top1"), ("Macro F1", "macro_f1")):
        names = [kind for kind in ("train", "val", "ema") if epochs and f"{kind}_{metric}" in epochs[0]]
        series = [
            {"name": kind, "points": [[row["epoch"], _or_gap(row[f"{kind}_{metric}"])] for row in epochs]}
            for kind in names
        ]
        if series:
            yield {"title": title, "x": "epoch", "log": False, "phases": phases, "series": series}


# Sentences


def _about(evaluation: Evaluation, run: RunRecord | None) -> list[str]:
    """Sentences about what was evaluated: the model, the data and the date first."""
    split = {"train": "training", "val": "validation", "test": "test"}[evaluation.split]
    images = counted(len(evaluation.paths), f"{split} image")
    lines = [f"{images} of {counted(len(evaluation.classes), 'class')}, evaluated in float32."]
    if run:
        lines.insert(0, f"{identity(run.facts)}.")
        images = run.facts.get("images", {})
        lines.append("Images of the run: " + ", ".join(f"{count} {name}" for name, count in images.items()) + ".")
    else:
        lines.insert(0, f"{evaluation.model}, data {evaluation.root.name}, {datetime.now(UTC).date()}.")
    return lines


def _images_note(total: int, listed: int) -> str:
    more = (
        ""
        if listed == total
        else f" The {listed} of {total} images with the highest losses are listed; predictions.csv has all."
    )
    return f"Mark the images to exclude, and export the list as CSV.{more}"


def _overlays_note(there: bool) -> str:
    return "Next to each image, Grad-CAM shows which regions led to the prediction." if there else ""


def _headline(evaluation: Evaluation) -> list[list[Any]]:
    """(name, value, its 95 % interval in words) of every metric."""
    return [
        [name, metric.value, f"95 % interval {metric.low:.4f} to {metric.high:.4f}"]
        for name, metric in evaluation.metrics.items()
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[list[Any]]:
    """(dotted name, value) of nested JSON objects, each value as text."""
    for name, value in values.items():
        if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            value = {str(number): one for number, one in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield [f"{before}{name}", value if isinstance(value, str) else json.dumps(value)]


def _or_gap(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rounded(value: float) -> float:
    """The value with four significant digits; 1e9 if it is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else 1e9
