"""Write the plots and the page of a finished run."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.check import Finding
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.files.outputs import inside
from resnet_dist.report import plots
from resnet_dist.report.evaluation import plot_numbers, prediction_grid
from resnet_dist.report.on_disk import RunRecord
from resnet_dist.report.page import write_run_page

if TYPE_CHECKING:
    from resnet_dist.evaluation.evidence import Evidence


def write_run_report(
    run: RunRecord,
    evaluation: Evaluation,
    look: Callable[[], Sequence[Finding] | None],
    explain: "Callable[[], Mapping[int, Evidence]]",
    with_images: bool = True,
) -> Path:
    """Draw the plots of a run and write its report.html. Returns the path of the page.

    `look` returns the results of `check` for all images, and `explain` Grad-CAM maps by position. A thread draws the
    plots meanwhile, because drawing keeps only one core busy. `with_images`: whether to draw the plots of the
    evaluation, some of which show images. Raises ArtifactError, DataError, MachineError.
    """
    folder = inside(run.path, "plots")
    with ThreadPoolExecutor(1) as pool:
        drawn = [pool.submit(draw_numbers, folder, run, evaluation if with_images else None)]
        findings = look()
        if with_images:  # after `look`, which keeps the images that the plot shows
            drawn.append(pool.submit(prediction_grid, folder / "predictions.png", evaluation))
        evidence = explain()
        for plot in drawn:
            plot.result()
    return write_run_page(run, evaluation, evidence, findings)


def draw_numbers(folder: Path, run: RunRecord, evaluation: Evaluation | None) -> None:
    """Draw the plots of a run, and those of its evaluation, that show no images. Raises ArtifactError, MachineError."""
    plots.curves(folder / "curves.png", run.epochs)
    plots.learning_rates(folder / "lr.png", run.steps)
    if evaluation is not None:
        plot_numbers(folder, evaluation)
