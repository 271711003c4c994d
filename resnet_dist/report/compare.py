"""Compare finished runs: a table, significance tests and curves."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.config.stored import read_toml
from resnet_dist.errors import ArtifactError, UsageError
from resnet_dist.evaluation.intervals import Interval, wilson
from resnet_dist.evaluation.significance import LEVEL, SignTest, holm, sign_test, t_interval
from resnet_dist.files.outputs import Kind, json_with
from resnet_dist.files.run import read_facts, to_csv, to_json, write_atomically
from resnet_dist.report import plots
from resnet_dist.runtime.notebook import html_table

COMPARISON = Kind("a comparison", "compare.json", json_with("images", "techniques", "pairs"))


@dataclass(frozen=True)
class FinishedRun:
    """The parts of a run folder that a comparison needs.

    Attributes:
        facts: its run.json.
        settings: its config.toml without the seed; runs with equal settings are seeds of one technique.
        images: (path, class) of every validation image.
        right: bool (images,), whether the best checkpoint predicts the image correctly.
        epochs: the rows of metrics.csv.
    """

    path: Path
    facts: Mapping[str, Any]
    settings: str
    images: tuple[tuple[str, str], ...]
    right: np.ndarray
    epochs: Sequence[Mapping[str, float]]


def read_run(path: Path) -> FinishedRun:
    """Read a finished run. Raises UsageError if it is not one, ArtifactError if its files are damaged."""
    facts = read_facts(path)
    if facts.get("status") != "done":
        raise UsageError(f"{path}: this run is not finished (status {facts.get('status')}); resume it first")
    settings = read_toml(path / "config.toml")
    settings["run"] = {name: value for name, value in settings.get("run", {}).items() if name != "seed"}
    try:
        rows = _rows(path / "eval" / "val" / "predictions.csv")
        epochs = [{name: float(value or "nan") for name, value in row.items()} for row in _rows(path / "metrics.csv")]
        images = tuple((row["path"], row["target"]) for row in rows)
        right = np.array([row["target"] == row["prediction"] for row in rows])
        float(facts["best"]["macro_f1"])
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ArtifactError(f"{path}: its evaluation or metrics are missing or damaged ({error})") from None
    if not images or not epochs:
        raise ArtifactError(f"{path}: its evaluation or metrics are empty")
    return FinishedRun(path, facts, json.dumps(settings, sort_keys=True), images, right, epochs)


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
        return list(csv.DictReader(stream))


def by_settings(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Group the runs that differ only in their seed. The key is the path of the first run of a group."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.settings, []).append(run)
    return {str(group[0].path): group for group in groups.values()}


def check_same_images(groups: Mapping[str, Sequence[FinishedRun]]) -> None:
    """Raise UsageError unless all runs were evaluated on the same images with the same labels."""
    first, *others = [run for group in groups.values() for run in group]
    for other in others:
        differing = set(first.images) ^ set(other.images)
        if differing:
            raise UsageError(
                f"{first.path} and {other.path} have different validation images ({len(differing)} differ, such as "
                f"'{min(differing)[0]}'): evaluate both on the same split"
            )


@dataclass(frozen=True)
class Technique:
    """A row of the table: a summary of the runs of one technique, one run per seed.

    Attributes:
        top1, macro_f1: means over the seeds, in 0..1.
        interval: 95 % interval of top1: Student's t over the seeds, or Wilson's over the images if there is one seed.
        minutes: training time, mean over the seeds; None if a run does not record it.
        peak_mib: highest memory of a process, on its GPU if it has one, otherwise on the host.
        trainable_parameters: the number of parameters that are trained in at least one phase.
    """

    name: str
    seeds: int
    top1: float
    interval: Interval
    macro_f1: float
    minutes: float | None
    peak_mib: int | None
    trainable_parameters: int | None


def summed_up(name: str, runs: Sequence[FinishedRun]) -> Technique:
    """One row of the table from the runs of a technique."""
    shares = [float(run.right.mean()) for run in runs]
    right = runs[0].right
    seconds = [run.facts.get("seconds") for run in runs]
    peaks = [run.facts.get("peak_memory", {}) for run in runs]
    return Technique(
        name=name,
        seeds=len(runs),
        top1=float(np.mean(shares)),
        interval=t_interval(shares) if len(runs) > 1 else wilson(int(right.sum()), len(right)),
        macro_f1=float(np.mean([run.facts["best"]["macro_f1"] for run in runs])),
        minutes=None if None in seconds else float(np.mean(seconds)) / 60,  # type: ignore[arg-type]
        peak_mib=max((peak.get("gpu_mib") or peak.get("host_mib", 0) for peak in peaks), default=0) or None,
        trainable_parameters=runs[0].facts.get("trainable_parameters"),
    )


@dataclass(frozen=True)
class Pair:
    """Two techniques, the better one first, with the sign test and its p-value corrected for all pairs."""

    first: str
    second: str
    test: SignTest
    corrected: float

    @property
    def is_real(self) -> bool:
        """Whether chance alone would give such a difference in less than 5 % of comparisons like this one."""
        return self.corrected < LEVEL


def pairs_of(techniques: Sequence[Technique], groups: Mapping[str, Sequence[FinishedRun]]) -> list[Pair]:
    """Every pair of techniques, the better one first. The correction covers all pairs, as all are compared."""
    rows = {name: _right_by_image(group) for name, group in groups.items()}
    tests = [(a.name, b.name, sign_test(rows[a.name], rows[b.name])) for a, b in combinations(techniques, 2)]
    corrected = holm([test.p for *_, test in tests])
    return [Pair(*pair, p) for pair, p in zip(tests, corrected, strict=True)]


def _right_by_image(group: Sequence[FinishedRun]) -> np.ndarray:
    """bool (runs, images), with the images sorted by path."""
    return np.stack([run.right[sorted(range(len(run.images)), key=run.images.__getitem__)] for run in group])


@dataclass(frozen=True)
class Comparison:
    """Techniques compared on the same validation images.

    Attributes:
        path: the folder with compare.md, compare.csv, compare.json and compare.png.
        images: the number of validation images.
        techniques: one row each, the best first.
        pairs: every pair of techniques, and whether their difference is significant.
        runs: the run folders of each technique.
    """

    path: Path
    images: int
    techniques: Sequence[Technique]
    pairs: Sequence[Pair]
    runs: Mapping[str, Sequence[Path]]

    def lines(self) -> list[str]:
        """The table and the findings as lines of Markdown."""
        return [*table_lines(self.techniques), "", *findings(self.techniques, self.pairs, self.images)]

    def _repr_html_(self) -> str:
        rows = [(t.name, "top-1 {:.4f} [{:.4f}, {:.4f}]".format(t.top1, *t.interval)) for t in self.techniques]
        real = f"{sum(pair.is_real for pair in self.pairs)} of {len(self.pairs)} pairs"
        return html_table(f"Comparison {self.path}", [*rows, ("real differences", real)])


def compared(folder: Path, groups: Mapping[str, Sequence[FinishedRun]]) -> Comparison:
    """Compare the runs of each technique. Raises UsageError if they were not evaluated on the same images."""
    check_same_images(groups)
    techniques = sorted((summed_up(name, group) for name, group in groups.items()), key=lambda t: -t.top1)
    images = len(next(iter(groups.values()))[0].images)
    runs = {name: [run.path for run in group] for name, group in groups.items()}
    return Comparison(folder, images, techniques, pairs_of(techniques, groups), runs)


def write_comparison(comparison: Comparison, groups: Mapping[str, Sequence[FinishedRun]]) -> None:
    """Write compare.md, compare.csv, compare.json and compare.png. Raises MachineError."""
    folder = comparison.path
    write_atomically(folder / COMPARISON.mark, to_json(as_json(comparison)))
    write_atomically(folder / "compare.csv", to_csv(COLUMNS, [_cells(t) for t in comparison.techniques]))
    plots.compared_curves(folder / "compare.png", {name: [r.epochs for r in group] for name, group in groups.items()})
    text = "\n".join(["# Techniques compared", "", *comparison.lines(), "", HOW, "", "![curves](compare.png)", ""])
    write_atomically(folder / "compare.md", text)


COLUMNS = ("technique", "seeds", "top1", "low", "high", "macro_f1", "minutes", "peak_mib", "trainable_parameters")
HOW = (
    "Top-1 has a 95 % interval. With several seeds it is Student's t over the seeds and covers another seed; with one "
    "seed it is Wilson's over the images and covers other images. A difference is called real if the exact sign test "
    "over the validation images (McNemar's test if there is one seed) gives p < 0.05 after Holm's correction for all "
    "pairs. With one seed this shows that these networks differ; another seed can still reverse the order. Time is the "
    "training time including validation. Memory is that of the process with the highest use."
)


def _cells(t: Technique) -> list[object]:
    return [t.name, t.seeds, t.top1, *t.interval, t.macro_f1, t.minutes, t.peak_mib, t.trainable_parameters]


def table_lines(techniques: Sequence[Technique]) -> list[str]:
    """The table in Markdown, with aligned columns."""
    header = ["technique", "seeds", "top-1", "95 % interval", "macro-F1", "min:s", "peak MiB", "trainable"]
    cells = [header, *map(_shown, techniques)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    padded.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(row)} |" for row in padded]


def _shown(t: Technique) -> list[str]:
    minutes = "" if t.minutes is None else "{}:{:02}".format(*divmod(round(60 * t.minutes), 60))
    peak = "" if t.peak_mib is None else f"{t.peak_mib:,}"
    trainable = "" if t.trainable_parameters is None else f"{t.trainable_parameters:,}"
    interval = "{:.3f} to {:.3f}".format(*t.interval)
    name = t.name.replace("|", "\\|")
    return [name, str(t.seeds), f"{t.top1:.4f}", interval, f"{t.macro_f1:.4f}", minutes, peak, trainable]


def findings(techniques: Sequence[Technique], pairs: Sequence[Pair], images: int) -> list[str]:
    """Sentences: the best technique, and whether each other technique differs significantly from it."""
    best = techniques[0]
    lines = [f"Best: {best.name}, top-1 {best.top1:.4f} on {images} validation images."]
    for pair in pairs:
        if pair.first != best.name:
            continue
        other = next(t for t in techniques if t.name == pair.second)
        verdict = "real" if pair.is_real else "noise"
        counts = f"{pair.test.first_better} images for the best, {pair.test.second_better} against"
        lines.append(
            f"- {other.name}: {100 * (best.top1 - other.top1):.1f} points behind: {verdict} "
            f"(p = {pair.corrected:.2g}; {counts})"
        )
    real = sum(pair.is_real for pair in pairs)
    lines.append(f"Of all {len(pairs)} pairs, {real} {'differs' if real == 1 else 'differ'} for real." if pairs else "")
    return [line for line in lines if line]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The content of compare.json."""
    return {
        "images": comparison.images,
        "techniques": [
            dict(zip(COLUMNS, _cells(t), strict=True)) | {"runs": [str(path) for path in comparison.runs[t.name]]}
            for t in comparison.techniques
        ],
        "pairs": [
            {
                "better": pair.first,
                "worse": pair.second,
                "images_for_better": pair.test.first_better,
                "images_for_worse": pair.test.second_better,
                "p": pair.test.p,
                "p_corrected": pair.corrected,
                "real": pair.is_real,
            }
            for pair in comparison.pairs
        ],
    }
