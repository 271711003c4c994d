"""What stands in the run folder once training has ended: the best checkpoint evaluated, and pictures."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from export.predict import Preprocessing
from resnet_dist.data.check import look_at_all
from resnet_dist.data.loader import TrainImages, epoch_order
from resnet_dist.data.transforms import ToInput
from resnet_dist.errors import DataError, NonFiniteError
from resnet_dist.evaluation.collect import collect_records
from resnet_dist.evaluation.metrics import Measured
from resnet_dist.evaluation.records import Records
from resnet_dist.files.outputs import inside
from resnet_dist.files.run import RunFolder
from resnet_dist.model.checkpoint import load_checkpoint
from resnet_dist.model.resnet import build
from resnet_dist.report.card import run_card
from resnet_dist.report.evaluation import plot_evaluation, write_evaluation
from resnet_dist.report.on_disk import read_csv, read_evaluation, read_text, understood
from resnet_dist.runtime.accelerate import model_from_main, on_main
from resnet_dist.runtime.wording import shortened
from resnet_dist.training.job import Job
from resnet_dist.training.state import Best, State

GRID = 16
FEW = 2_000  # images that are decoded once more at the end of a run


def finish(job: Job, state: State) -> dict[str, Measured]:
    """Evaluate the best checkpoint in float32 and write everything that belongs to a finished run.

    Every process must call this. Returns the headline metrics. Raises NonFiniteError if no epoch had a finite score.
    """
    best = state.best
    if best is None:
        raise NonFiniteError("no epoch had a finite validation score, so there is no best checkpoint; lower --lr")
    load = functools.partial(load_checkpoint, job.run.best)
    model, _ = model_from_main(job.accelerator, load, lambda description: build(description.architecture))
    classes = job.index.classes
    records = collect_records(job.accelerator, model, job.val_loader, job.to_input, len(classes), True, job.stop.check)
    metrics = on_main(job.accelerator, lambda: write_results(job.run, job, best, records))
    if job.cfg.run.report:
        on_main(job.accelerator, lambda: write_report(job, model, records))
    return metrics


def write_results(run: RunFolder, job: Job, best: Best, records: Records) -> dict[str, Measured]:
    """Write the evaluation, the result and the model card of a finished run. On the main process."""
    metrics = write_evaluation(inside(run.path, "eval", "val"), job.index.val, records, job.index.classes)
    values = {name: metric.value for name, metric in metrics.items()}
    run.update(
        status="done", exit_code=0, reason="", best={"epoch": best.epoch, "weights": best.weights_kind, **values}
    )
    run.write("README.md", run_card(run.path))
    return metrics


def write_report(job: Job, model: nn.Module, records: Records) -> Path:
    """Draw the plots of a finished run and write its report.html, on the main process.

    Near duplicates are listed if the run has so few images that all of them are read quickly.
    """
    from resnet_dist.report.page import write_run_page  # with matplotlib: only who draws waits for it

    path, index = job.run.path, job.index
    plot_run(path)
    plot_evaluation(job.run.plots, index.val, records, index.classes, job.spec)
    evaluation = read_evaluation(path / "eval" / "val", index.root, "val", index.classes)
    images = len(index.train) + len(index.val) + len(index.test)
    findings = look_at_all(index, full=True) if images <= FEW else None
    return write_run_page(path, evaluation, model, job.spec, findings)


def plot_run(run: Path) -> None:
    """Draw curves.png and lr.png of a run folder from its metrics.csv and metrics.jsonl. Raises ArtifactError."""
    from resnet_dist.report import plots

    epochs_file, steps_file = run / "metrics.csv", run / "metrics.jsonl"
    with understood(epochs_file):
        epochs = [{name: float(value) for name, value in row.items()} for row in read_csv(epochs_file)]
    with understood(steps_file):
        steps = [json.loads(line) for line in read_text(steps_file).splitlines()]
    folder = inside(run, "plots")
    plots.curves(folder / "curves.png", epochs)
    plots.learning_rates(folder / "lr.png", steps)


def plot_samples(file: Path, images: TrainImages, classes: Sequence[str], spec: Preprocessing) -> None:
    """The first training samples as the network sees them: augmented, normalised, mixed, and made visible again.

    Raises DataError if one cannot be read.
    """
    from resnet_dist.report import plots

    order = epoch_order(len(images.table), images.seed, 0, 2, drop_last=False)[:GRID]
    batch = images.__getitems__([(0, int(index)) for index in order])
    if isinstance(batch, DataError):
        raise batch
    inputs = ToInput(spec, torch.device("cpu"))(batch).permute(0, 2, 3, 1)
    visible = (inputs * torch.tensor(spec.std) + torch.tensor(spec.mean)).clamp(0, 1).mul(255).round().to(torch.uint8)
    titles = [shortened(classes[target], 22) for target in batch.targets.tolist()]
    if batch.mix is not None:
        others = [shortened(classes[target], 12) for target in batch.partners.tolist()]
        shares = batch.mix[:, 0].tolist()
        titles = [f"{t} {s:.2f}\n{o}" for t, s, o in zip(titles, shares, others, strict=True)]
    plots.image_grid(file, list(visible.numpy()), titles)
