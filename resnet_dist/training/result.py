"""`Run`: a training and its results, as `train` and `load_run` return them."""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.config.stored import read_toml
from resnet_dist.errors import ArtifactError
from resnet_dist.files.reading import parse_json, read_bounded
from resnet_dist.files.run import MAX_FACTS, RunFolder, read_facts
from resnet_dist.runtime.notebook import html_table

if TYPE_CHECKING:
    from resnet_dist.evaluation.metrics import Measured


@dataclass(frozen=True)
class Run:
    """A training and its results. `facts`, `config` and `epochs` are read from the run folder when first used.

    Attributes:
        path: the run folder.
        metrics: the metrics of the best checkpoint on the validation images, each with its 95 % interval, as
            `Measured`: loss (nats), top1, top5, macro_f1 and ece (each 0..1). Empty if the run is not done.
    """

    path: Path
    metrics: "Mapping[str, Measured]"

    def __fspath__(self) -> str:
        """The run folder: a Run can be given wherever a path can."""
        return str(self.path)

    @property
    def best(self) -> Path:
        """The best checkpoint: a safetensors file with torchvision's parameter names."""
        return RunFolder(self.path).best

    @property
    def status(self) -> str:
        """The status in run.json: "running", "done", "failed" or "preempted"."""
        return str(self.facts.get("status"))

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What run.json says: data, seed, batch, launches, versions, peak memory. Raises UsageError."""
        return read_facts(self.path)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """All settings of the run by section, as in config.toml: `run.config["optim"]["lr"]`. Raises UsageError."""
        return read_toml(self.path / "config.toml")

    @cached_property
    def epochs(self) -> list[dict[str, float]]:
        """A row for every epoch, as in metrics.csv; `pandas.DataFrame(run.epochs)` is a table. Raises ArtifactError."""
        file = self.path / "metrics.csv"
        if not file.exists():
            return []
        try:
            with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
                return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(stream)]
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise ArtifactError(f"{file}: damaged, or it cannot be read ({error})") from None

    def _repr_html_(self) -> str:
        rows = [("status", self.status), *((name, str(metric)) for name, metric in self.metrics.items())]
        best = self.facts.get("best")
        if isinstance(best, dict) and "epoch" in best:
            rows.append(("best epoch", f"{best['epoch']} of {len(self.epochs)}"))
        rows.append(("best checkpoint", str(self.best)))
        return html_table(f"Run {self.path}", rows)


def load_run(path: str | os.PathLike[str]) -> Run:
    """The run in a run folder, done or not.

    Raises UsageError if `path` is no run folder, ArtifactError if its evaluation is damaged.
    """
    folder = Path(path)
    facts = read_facts(folder)
    return Run(folder, _stored_metrics(folder / "eval" / "val" / "metrics.json") if facts["status"] == "done" else {})


def _stored_metrics(file: Path) -> "dict[str, Measured]":
    from resnet_dist.evaluation.metrics import Measured

    try:
        values = parse_json(read_bounded(file, MAX_FACTS))
        intervals = values["intervals"]
        return {name: Measured(float(values[name]), *map(float, ends)) for name, ends in intervals.items()}
    except (OSError, json.JSONDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: damaged, or it cannot be read ({error})") from None
