"""Write the plots and the page of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.check import Finding
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.files.outputs import inside
from resnet_dist.report import plots
from resnet_dist.report.evaluation import plot_evaluation
from resnet_dist.report.on_disk import RunRecord
from resnet_dist.report.page import write_run_page

if TYPE_CHECKING:
    from resnet_dist.evaluation.evidence import Evidence


def write_run_report(
    run: RunRecord,
    evaluation: Evaluation,
    evidence: "Mapping[int, Evidence]",
    findings: Sequence[Finding] | None,
    with_images: bool = True,
) -> Path:
    """Draw the plots of a run and write its report.html. Returns the path of the page.

    `evidence`: Grad-CAM maps by position. `findings`: the results of `check` for all images. `with_images`: whether to
    draw the plots of the evaluation, some of which show images. Raises ArtifactError, DataError, MachineError.
    """
    folder = inside(run.path, "plots")
    plots.curves(folder / "curves.png", run.epochs)
    plots.learning_rates(folder / "lr.png", run.steps)
    if with_images:
        plot_evaluation(folder, evaluation)
    return write_run_page(run, evaluation, evidence, findings)
