"""The end of a training: the best checkpoint is evaluated, and the results are written into the run folder."""

import functools

import numpy as np
import torch
from torch import nn

from export.predict import Preprocessing
from resnet_dist.data.check import Finding, look_at_all
from resnet_dist.data.loader import TrainImages, epoch_order
from resnet_dist.data.transforms import ToInput
from resnet_dist.errors import DataError, NonFiniteError
from resnet_dist.evaluation.collect import collect_records
from resnet_dist.evaluation.evidence import evidence_of
from resnet_dist.evaluation.metrics import Measured
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.result import Evaluation, evaluation_of
from resnet_dist.files.outputs import inside
from resnet_dist.files.run import read_facts
from resnet_dist.model.checkpoint import Description, load_checkpoint
from resnet_dist.model.resnet import build
from resnet_dist.report.card import CardFacts, run_card
from resnet_dist.report.evaluation import write_evaluation
from resnet_dist.runtime.accelerate import model_from_main, on_main
from resnet_dist.runtime.wording import shortened
from resnet_dist.training.job import Job
from resnet_dist.training.state import Best, State

SAMPLES = 16
FEW = 2_000  # the report looks for near duplicates in data sets of at most this many images


def finish(job: Job, state: State) -> dict[str, Measured]:
    """Evaluate the best checkpoint in float32 and write everything that belongs to a finished run.

    It is not evaluated again if the best epoch's validation in this process gave the same records already. Every
    process must call this. Returns the headline metrics. Raises NonFiniteError if no epoch had a finite score.
    """
    best = state.best
    if best is None:
        raise NonFiniteError("no epoch had a finite validation score, so there is no best checkpoint; lower --lr")
    load = functools.partial(load_checkpoint, job.run.best)
    model, description = model_from_main(job.accelerator, load, lambda description: build(description.architecture))
    classes = len(job.plan.index.classes)
    records = state.best_records
    if records is None:
        with job.display.busy("evaluating the best checkpoint in float32"):
            records = collect_records(
                job.accelerator, model, job.val_loader, job.to_input, classes, True, job.stop.check
            )
    else:
        job.stop.check()
    with job.display.busy("writing tables, plots and report.html"):
        return on_main(job.accelerator, lambda: write_run(job, best, model, description, records))


def write_run(
    job: Job, best: Best, model: nn.Module, description: Description, records: Records
) -> dict[str, Measured]:
    """Write the evaluation, the result, the model card and, unless --no-report, plots and page. On the main process."""
    folder, index = inside(job.run.path, "eval", "val"), job.plan.index
    evaluation = evaluation_of(records, index.val, "val", index.classes, job.plan.spec, job.run.best, folder)
    write_evaluation(folder, evaluation)
    values = {name: metric.value for name, metric in evaluation.metrics.items()}
    job.run.update(
        status="done", exit_code=0, reason="", best={"epoch": best.epoch, "weights": best.weights_kind, **values}
    )
    card = run_card(CardFacts(read_facts(job.run.path), evaluation.summary, description))
    job.run.write("README.md", card)
    if job.plan.cfg.run.report:
        write_report(job, model, evaluation)
    return dict(evaluation.metrics)


def write_report(job: Job, model: nn.Module, evaluation: Evaluation) -> None:
    """Draw the plots of a finished run and write its report.html. On the main process.

    Near duplicates are searched for if the data set is small enough to read every image quickly.
    """
    from resnet_dist.report.on_disk import read_run_record
    from resnet_dist.report.training import write_run_report  # it imports matplotlib, which takes a second

    index = job.plan.index
    images = len(index.train) + len(index.val) + len(index.test)

    def look() -> list[Finding] | None:
        return look_at_all(index, full=True, seen=evaluation.pictures.keep) if images <= FEW else None

    counts = np.bincount(index.train.targets, minlength=len(index.classes)).tolist()
    run = read_run_record(job.run.path, dict(zip(index.classes, counts, strict=True)))
    write_run_report(run, evaluation, look, lambda: evidence_of(model, evaluation))


def first_samples(
    images: TrainImages, classes: tuple[str, ...], spec: Preprocessing
) -> tuple[list[np.ndarray], list[str]]:
    """The first training samples as the network sees them: augmented, mixed and converted back to visible pixels.

    Returns images, uint8 (S, S, 3) each, and their titles. Raises DataError if one cannot be read.
    """
    order = epoch_order(len(images.table), images.seed, 0, 2, drop_last=False)[:SAMPLES]
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
    return list(visible.numpy()), titles
