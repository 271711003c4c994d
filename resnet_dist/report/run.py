"""Report on a run whose training has ended: draw its plots and write its report.html from what it left on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config.fields import option
from resnet_dist.errors import UsageError

if TYPE_CHECKING:
    from resnet_dist.data.check import Finding
    from resnet_dist.data.index import ImageIndex
    from resnet_dist.evaluation.result import Evaluation


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw the plots of a run and write its report.html again, with what was found since: label errors of training
    images, near duplicates."""

    run: str | None = option(None, positional=True)
    """A run folder whose training has ended."""
    near_duplicates: bool = True
    """Look for near duplicates among all images; the findings are cached, as by `check`."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder"


def run_report(cfg: ReportConfig) -> Path:
    """Write the plots and the page; returns the page. Raises UsageError, DataError, ArtifactError, MachineError."""
    from resnet_dist.evaluation.evidence import evidence_of
    from resnet_dist.files.run import is_run, read_facts
    from resnet_dist.model.checkpoint import load_checkpoint
    from resnet_dist.report.on_disk import read_run_evaluation, read_run_record
    from resnet_dist.report.training import write_run_report

    run = Path(cfg.run or "")
    if read_facts(run) and not is_run(run):  # a report.html in it may be somebody else's
        raise UsageError(f"{run}: its run.json is not that of a run")
    model, description = load_checkpoint(run / "checkpoints" / "best.safetensors")
    evaluation = read_run_evaluation(run, description.classes, description.preprocessing)
    findings = look_at(index_of(run, evaluation)) if cfg.near_duplicates else None
    has_images = evaluation.root.is_dir()  # otherwise the page says that they are gone
    return write_run_report(read_run_record(run), evaluation, evidence_of(model, evaluation), findings, has_images)


def index_of(run: Path, evaluation: "Evaluation") -> "ImageIndex":
    """All images of a run. Raises DataError if they are no longer there."""
    import numpy as np

    from resnet_dist.data.index import ImageIndex, ImageTable, PathTable, read_run_part
    from resnet_dist.files.run import read_facts

    images, classes = read_facts(run).get("images", {}), evaluation.classes
    nothing = ImageTable(evaluation.root, PathTable([]), np.empty(0, np.int64))
    parts = {name: read_run_part(run, name, classes) for name in ("train", "val", "test") if images.get(name)}
    train, val, test = (parts.get(name, nothing) for name in ("train", "val", "test"))
    return ImageIndex(evaluation.root, classes, train, val, test)


def look_at(index: "ImageIndex") -> "list[Finding]":
    """What a look at every image finds, from the cache of `check` where it has been looked at before."""
    from resnet_dist.data.check import Cache, look_at_all
    from resnet_dist.data.check_report import cache_file

    cache = Cache(cache_file(index.root))
    findings = look_at_all(index, full=True, cache=cache)
    cache.save()
    return findings
