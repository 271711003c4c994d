"""Check a data set before training: read every image and report errors, duplicates and leaks."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.config.fields import option
from resnet_dist.config.layers import from_keywords, keyword_signature
from resnet_dist.config.schema import DataConfig, PreprocessConfig
from resnet_dist.errors import python_errors
from resnet_dist.files.outputs import json_problems
from resnet_dist.runtime.notebook import html_table
from resnet_dist.runtime.wording import counted, printable

if TYPE_CHECKING:
    from resnet_dist.data.check import Finding, Report

SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check a data set: unusable and unusual files, duplicates, leaks between splits.

    The exit code is 3 if a file cannot be used.
    """

    data: str | None = option(None, "--train-dir", positional=True)
    """A folder with train/ and val/, or one folder of class folders, or a CSV manifest (path,label[,split])."""
    val_dir: str | None = option(None, "--validation-dir")
    """A separate folder of class folders for validation."""
    preprocess: PreprocessConfig = PreprocessConfig()
    report: str | None = option(None, "--json")
    """Write the results to this JSON file. An earlier report is replaced."""
    cache: bool = True
    """Cache the results by path, size and modification time, so that a second check is fast."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        yield from DataConfig(data=self.data, val_dir=self.val_dir).problems()
        yield from self.preprocess.problems()
        yield from json_problems("--report", self.report, "images", "per_class", "duplicates")


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        root: the folder to which the paths are relative.
        facts: the results as plain JSON values, which `report=` writes.
        notes: notes and warnings about the files.
        report: a `Report` with one `Finding` per file.
    """

    root: Path
    facts: Mapping[str, Any]
    notes: Sequence[str]
    report: "Report"

    @property
    def ok(self) -> bool:
        """Whether every file can be used."""
        return not self.report.errors

    @property
    def errors(self) -> "list[Finding]":
        """The files that cannot be used: each has a path and an error."""
        return self.report.errors

    @property
    def duplicates(self) -> "list[list[Finding]]":
        """Groups of identical files."""
        return self.report.duplicates

    @property
    def leaks(self) -> "list[list[Finding]]":
        """Groups of identical files in several splits."""
        return self.report.leaks

    @property
    def contradictions(self) -> "list[list[Finding]]":
        """Groups of identical files under several labels."""
        return self.report.contradictions

    def lines(self) -> list[str]:
        """The report as lines of text."""
        return [*self.notes, *lines(self.report, self.facts)]

    def _repr_html_(self) -> str:
        rows = {"images": self.facts["images"], "cannot be used": len(self.errors)}
        rows |= {f"{split} images": sum(counts.values()) for split, counts in self.facts["per_class"].items()}
        rows |= {"groups of identical files": len(self.duplicates), "leaks between splits": len(self.leaks)}
        rows |= {"contradicting labels": len(self.contradictions), "alike": len(self.report.near_duplicates)}
        return html_table(f"Check of {self.root}", [(name, str(value)) for name, value in rows.items()])


def check(data: str | os.PathLike[str], *, verbose: bool = False, **settings: Any) -> CheckReport:
    """Check every image of a data set: unusable, unusual and duplicate files, leaks between splits.

    `data` is a folder or a CSV manifest; the keywords are the options of `resnet-dist check`. With `verbose`, progress
    and findings are printed. Raises UsageError, DataError if the files cannot be listed, MachineError. An image that
    cannot be used raises nothing; the report lists it.
    """
    with python_errors():
        report = run_check(from_keywords(CheckConfig, {"data": data, **settings}), verbose)
    for line in report.lines() if verbose else ():
        print(printable(line))
    return report


check.__signature__ = keyword_signature(CheckConfig, verbose=False)  # type: ignore[attr-defined]


def run_check(cfg: CheckConfig, progress: bool = True) -> CheckReport:
    """Check every image and write `cfg.report`. `progress` shows a progress bar. Raises ResnetDistError."""
    from rich.console import Console
    from rich.progress import Progress

    from resnet_dist.data.check import Cache, look_at_all, report_on, summary
    from resnet_dist.data.index import read_index
    from resnet_dist.data.preprocess import preprocessing
    from resnet_dist.files.run import to_json, write_atomically

    index = read_index(DataConfig(data=cfg.data, val_dir=cfg.val_dir))
    total = len(index.train) + len(index.val) + len(index.test)
    cache = Cache(cache_file(index.root)) if cfg.cache else None
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("checking images", total=total)
        findings = look_at_all(index, full=True, cache=cache, advance=lambda: bar.advance(task))
    if cache:
        cache.save()
    report = report_on(findings)
    facts = summary(report, preprocessing(cfg.preprocess))
    if cfg.report is not None:
        write_atomically(Path(cfg.report), to_json(facts))
    return CheckReport(index.root, facts, index.notes, report)


def cache_file(root: Path) -> Path:
    """The cache file for the findings of a data set."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "resnet-dist" / f"check-{sha256(os.fsencode(root.absolute())).hexdigest()[:16]}.json"


def lines(report: "Report", facts: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    yield f"{counted(facts['images'], 'image')}, {len(report.errors)} that cannot be used"
    yield from _some([f"  {finding.path}: {finding.error}" for finding in report.errors], 20)
    for split, counts in facts["per_class"].items():
        low, high = min(counts.values()), max(counts.values())
        images = counted(sum(counts.values()), "image")
        yield f"{split}: {images} of {counted(len(counts), 'class')}, {low} to {high} each"
    if facts["short_side"]:
        side, ratio = facts["short_side"], facts["aspect_ratio"]
        pixels = f"short side {side['min']} to {side['max']} pixels, median {side['median']}"
        yield f"{pixels}; aspect ratio to {ratio['max']:.2f}"
        cut, half = 100 * facts["crop"]["mean_share_cut"], facts["crop"]["images_cut_by_half"]
        yield f"the evaluation crop cuts off {cut:.0f} % of the area on average, over half of {counted(half, 'image')}"
    yield f"formats {_counted(facts['formats'])}; modes {_counted(facts['modes'])}; {facts['rotated']} rotated by Exif"
    yield from _listing("with an extension of another format", facts["wrong_extension"])
    yield from _listing("under 32 pixels", facts["tiny"])
    alike = {finding.path for pair in report.near_duplicates for finding in pair}
    pairs = f"{counted(len(report.near_duplicates), 'pair')} of images that look alike"
    pairs += f" ({counted(len(alike), 'image')})" if alike else ""
    yield f"{counted(len(report.duplicates), 'group')} of identical files, {pairs}"
    yield from _groups("LEAK: identical files in several splits", report.leaks)
    yield from _groups("possible leak: images that look alike in several splits", [list(p) for p in report.near_leaks])
    yield from _groups("CONTRADICTION: identical files under several labels", report.contradictions)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _listing(what: str, paths: list[str]) -> Iterator[str]:
    if paths:
        yield f"{len(paths)} {what}: {', '.join(paths[:SHOWN])}{' ...' if len(paths) > SHOWN else ''}"


def _groups(what: str, groups: list[list[Any]]) -> Iterator[str]:
    if groups:
        yield f"{what}: {len(groups)}"
        yield from _some(["  " + " = ".join(finding.path for finding in group) for group in groups], SHOWN)


def _some(texts: list[str], most: int) -> Iterator[str]:
    yield from texts[:most]
    if len(texts) > most:
        yield f"  and {len(texts) - most} more"
