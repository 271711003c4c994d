"""The result of an evaluation in memory. Tables, plots, page and model card are written from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.predict import Preprocessing
from resnet_dist.data.index import ImageTable
from resnet_dist.evaluation.metrics import Measured, confusion, measured, per_class
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.reliability import Reliability, reliability
from resnet_dist.runtime.notebook import html_table

if TYPE_CHECKING:
    from resnet_dist.data.pictures import Pictures
    from resnet_dist.evaluation.calibrate import Calibration

TOP_LOSSES = 24
SAMPLES = 16


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluation:
    """The predictions of a model for n images, and their metrics.

    Attributes:
        model: the checkpoint or exported model.
        table: the images, in the order of `records`.
        split: "train", "val" or "test".
        classes: the class names, in the order of the model's outputs.
        spec: the preprocessing of the images.
        records: target, loss, best classes and their probabilities of every image.
        metrics: loss, top1, top5, macro_f1 and ece, each with its 95 % interval.
        reliability: accuracy and mean confidence per bin of confidence.
        facts: the other values in metrics.json: how the model was evaluated.
        calibration: the calibration of the probabilities, or None.
        calibration_file: the file of the calibration, if this evaluation wrote one.
        folder: the folder of the evaluation, or None if it is not saved.
    """

    model: Path
    table: ImageTable
    split: str
    classes: tuple[str, ...]
    spec: Preprocessing
    records: Records
    metrics: Mapping[str, Measured]
    reliability: Reliability
    facts: Mapping[str, Any] = field(default_factory=dict)
    calibration: "Calibration | None" = None
    calibration_file: Path | None = None
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def root(self) -> Path:
        """The folder to which the paths are relative."""
        return self.table.root

    @cached_property
    def paths(self) -> list[str]:
        """The paths of the images, in the order of `records`."""
        return list(self.table.paths)

    @cached_property
    def confusion(self) -> np.ndarray:
        """int64 (classes, classes): how many images of each class (row) are predicted as each class (column)."""
        return confusion(self.records, self.classes)

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """For every class: class, images, precision, recall and f1 in 0..1, or None if the class has no images."""
        return per_class(self.records, self.classes)

    @cached_property
    def pictures(self) -> "Pictures":
        """The images that a report shows, each decoded once."""
        from resnet_dist.data.pictures import Pictures

        return Pictures(self.table, self.spec, (*self.top_losses, *self.samples))

    @property
    def summary(self) -> dict[str, Any]:
        """The content of metrics.json: the number of images, the metrics, their intervals and `facts`."""
        values = {name: metric.value for name, metric in self.metrics.items()}
        intervals = {name: [metric.low, metric.high] for name, metric in self.metrics.items()}
        return {"images": len(self), **values, "intervals": intervals, **self.facts}

    @property
    def top_losses(self) -> list[int]:
        """Positions of the 24 images with the highest losses, the highest first."""
        return [int(position) for position in np.argsort(-self.records.loss, kind="stable")[:TOP_LOSSES]]

    @property
    def samples(self) -> list[int]:
        """Positions of 16 images, evenly spread over the table."""
        return self.table.spread(SAMPLES)

    def __repr__(self) -> str:
        top1 = self.metrics["top1"]
        return f"Evaluation({len(self)} {self.split} images, top1 {top1}, folder={str(self.folder)!r})"

    def _repr_html_(self) -> str:
        from resnet_dist.evaluation.summary import summary_rows, title_of

        return html_table(title_of(self), summary_rows(self))


def evaluation_of(
    records: Records,
    table: ImageTable,
    split: str,
    classes: Sequence[str],
    spec: Preprocessing,
    model: Path,
    folder: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Make an evaluation from records: compute the metrics and the reliability."""
    return Evaluation(
        model=model,
        table=table,
        split=split,
        classes=tuple(classes),
        spec=spec,
        records=records,
        metrics=measured(records),
        reliability=reliability(records),
        facts=facts or {},
        folder=folder,
    )
