"""The plots and the page of a run whose training has ended."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.check import Finding
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.files.outputs import inside
from resnet_dist.report import plots
from resnet_dist.report.evaluation import plot_evaluation
from resnet_dist.report.on_disk import read_csv, read_text, understood
from resnet_dist.report.page import write_run_page

if TYPE_CHECKING:
    from resnet_dist.evaluation.evidence import Evidence


def write_run_report(
    run: Path,
    evaluation: Evaluation,
    evidence: "Mapping[int, Evidence]",
    findings: Sequence[Finding] | None,
    with_images: bool = True,
) -> Path:
    """Draw the plots of a run and write its report.html; returns the page.

    `evidence`: what Grad-CAM shows, by position; `findings`: what a look at all images found; `with_images`: whether
    the plots of the evaluation, which show some images, are drawn. Raises ArtifactError, DataError, MachineError.
    """
    plot_run(run)
    if with_images:
        plot_evaluation(inside(run, "plots"), evaluation)
    return write_run_page(run, evaluation, evidence, findings)


def plot_run(run: Path) -> None:
    """Draw curves.png and lr.png of a run folder from its metrics.csv and metrics.jsonl. Raises ArtifactError."""
    epochs_file, steps_file = run / "metrics.csv", run / "metrics.jsonl"
    with understood(epochs_file):
        epochs = [{name: float(value) for name, value in row.items()} for row in read_csv(epochs_file)]
    with understood(steps_file):
        steps = [json.loads(line) for line in read_text(steps_file).splitlines()]
    folder = inside(run, "plots")
    plots.curves(folder / "curves.png", epochs)
    plots.learning_rates(folder / "lr.png", steps)
