"""Draw the plots of a finished run and write its report.html from the files in the run folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config.fields import option, required
from resnet_dist.errors import UsageError

if TYPE_CHECKING:
    from resnet_dist.data.check import Finding
    from resnet_dist.data.index import ImageIndex
    from resnet_dist.evaluation.result import Evaluation


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw the plots of a finished run and write its report.html again. The page then includes near duplicates and the
    label errors that `label-errors` found."""

    run: str | None = option(None, positional=True)
    """The folder of a finished run."""
    near_duplicates: bool = True
    """Look for near duplicates among all images. The cache of `check` is used."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder"


def run_report(cfg: ReportConfig) -> Path:
    """Write the plots and the page. Returns the path of the page.

    Raises UsageError, DataError, ArtifactError, MachineError.
    """
    from resnet_dist.evaluation.evidence import evidence_of
    from resnet_dist.files.run import is_run, read_facts
    from resnet_dist.model.checkpoint import load_checkpoint
    from resnet_dist.report.on_disk import read_run_evaluation, read_run_record
    from resnet_dist.report.training import write_run_report

    run = Path(required(cfg.run, "RUN"))
    if read_facts(run) and not is_run(run):  # its report.html may belong to another program
        raise UsageError(f"{run}: its run.json does not belong to a training run")
    model, description = load_checkpoint(run / "checkpoints" / "best.safetensors")
    evaluation = read_run_evaluation(run, description.classes, description.preprocessing)
    index = index_of(run, evaluation) if cfg.near_duplicates else None
    has_images = evaluation.root.is_dir()  # otherwise the page says that the images are missing

    def look() -> "list[Finding] | None":
        return None if index is None else look_at(index, evaluation)

    record = read_run_record(run)
    return write_run_report(record, evaluation, look, lambda: evidence_of(model, evaluation), has_images)


def index_of(run: Path, evaluation: "Evaluation") -> "ImageIndex":
    """The index of all images of a run. Raises DataError if they no longer exist."""
    import numpy as np

    from resnet_dist.data.index import ImageIndex, ImageTable, PathTable, read_run_part
    from resnet_dist.files.run import read_facts

    images, classes = read_facts(run).get("images", {}), evaluation.classes
    nothing = ImageTable(evaluation.root, PathTable([]), np.empty(0, np.int64))
    parts = {name: read_run_part(run, name, classes) for name in ("train", "val", "test") if images.get(name)}
    train, val, test = (parts.get(name, nothing) for name in ("train", "val", "test"))
    return ImageIndex(evaluation.root, classes, train, val, test)


def look_at(index: "ImageIndex", evaluation: "Evaluation") -> "list[Finding]":
    """Check every image, or read the finding from the cache of `check`.

    The pictures of a small data set are kept for the report, so that no image is decoded twice.
    """
    from resnet_dist.data.check import Cache, look_at_all
    from resnet_dist.data.check_report import cache_file
    from resnet_dist.data.pictures import MOST_KEPT

    cache = Cache(cache_file(index.root))
    images = len(index.train) + len(index.val) + len(index.test)
    seen = evaluation.pictures.keep if images <= MOST_KEPT else None
    findings = look_at_all(index, full=True, cache=cache, seen=seen)
    cache.save()
    return findings
