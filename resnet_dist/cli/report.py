"""`resnet-dist report`: draw the plots of a run and write its report.html again."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.config.fields import option
from resnet_dist.errors import UsageError

if TYPE_CHECKING:
    from resnet_dist.data.check import Finding
    from resnet_dist.data.index import ImageIndex
    from resnet_dist.report.on_disk import Evaluation


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draw the plots of a run and write its report.html again, with later findings: label errors of training images,
    near duplicates."""

    run: str | None = option(None, positional=True)
    """A run folder whose training has ended."""
    near_duplicates: bool = True
    """Look at every image for near duplicates; what is found is remembered, as by `check`."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder"


def main(cfg: Config) -> int:
    """Write the page. Returns the exit code."""
    from resnet_dist.data.index import read_run_part
    from resnet_dist.files.outputs import inside
    from resnet_dist.files.run import is_run, read_facts
    from resnet_dist.model.checkpoint import load_checkpoint
    from resnet_dist.report.evaluation import plot_evaluation
    from resnet_dist.report.on_disk import read_run_evaluation
    from resnet_dist.report.page import write_run_page
    from resnet_dist.report.training import plot_run

    run = Path(cfg.run or "")
    if read_facts(run) and not is_run(run):  # a report.html in it may be somebody else's
        raise UsageError(f"{run}: its run.json is not that of a run")
    model, description = load_checkpoint(run / "checkpoints" / "best.safetensors")
    evaluation = read_run_evaluation(run, description.classes)
    plot_run(run)
    if evaluation.root.is_dir():  # otherwise the samples cannot be drawn, and the page says so
        table = read_run_part(run, "val", description.classes)
        plot_evaluation(inside(run, "plots"), table, evaluation.records, description.classes, description.preprocessing)
    findings = looked_at(run_index(run, evaluation)) if cfg.near_duplicates else None
    file = write_run_page(run, evaluation, model, description.preprocessing, findings)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


def run_index(run: Path, evaluation: "Evaluation") -> "ImageIndex":
    """All images of a run. Raises DataError where they are no longer there."""
    import numpy as np

    from resnet_dist.data.index import ImageIndex, ImageTable, PathTable, read_run_part
    from resnet_dist.files.run import read_facts

    images, classes = read_facts(run).get("images", {}), evaluation.classes

    def part(name: str) -> ImageTable:
        there = images.get(name)
        return read_run_part(run, name, classes) if there else ImageTable(evaluation.root, PathTable([]), no_targets)

    no_targets = np.empty(0, np.int64)
    return ImageIndex(evaluation.root, classes, part("train"), part("val"), part("test"))


def looked_at(index: "ImageIndex") -> "list[Finding]":
    """What every image is, from the memory of `check` or by looking."""
    from resnet_dist.data.check import Cache, look_at_all
    from resnet_dist.data.check_report import cache_file

    cache = Cache(cache_file(index.root))
    findings = look_at_all(index, full=True, cache=cache)
    cache.save()
    return findings
