"""Repeat a run from its folder, and compare both runs."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_dist.config.layers import resolve
from resnet_dist.config.schema import TrainConfig
from resnet_dist.errors import ArtifactError, DataError, UsageError
from resnet_dist.files.run import read_facts, to_json, write_atomically
from resnet_dist.runtime.accelerate import on_main, start
from resnet_dist.runtime.display import Display
from resnet_dist.training.facts import what_is_trained
from resnet_dist.training.plan import Plan, make_plan
from resnet_dist.training.run import run_training

COMPARED = ("top1", "top5", "macro_f1")  # the metrics that the tolerance applies to


@dataclass(frozen=True)
class Reproduction:
    """A run and its repetition.

    Attributes:
        metrics: for each metric, its value in both runs.
        digests: the sha256 of both best checkpoints.
        differences: what differs between both launches and may change the result, as `name old -> new`.
    """

    old: Path
    new: Path
    metrics: Mapping[str, tuple[float, float]]
    digests: Sequence[str]
    differences: Sequence[str]

    @property
    def same_bytes(self) -> bool:
        """Whether the best checkpoints of both runs are byte for byte the same file."""
        return self.digests[0] == self.digests[1]

    @property
    def furthest(self) -> float:
        """The largest difference of the metrics in COMPARED; NaN if one of them is NaN."""
        changes = [abs(value - was) for was, value in (self.metrics[name] for name in COMPARED)]
        return math.nan if any(map(math.isnan, changes)) else max(changes)

    def lines(self) -> Iterator[str]:
        """The comparison as text."""
        for name, (was, value) in self.metrics.items():
            yield f"{name:<9} {was:.6f} -> {value:.6f}  {'same' if was == value else f'{value - was:+.6f}'}"
        bytes_ = "the same bytes" if self.same_bytes else "other bytes"
        yield f"best.safetensors: {bytes_} (sha256 {self.digests[1][:16]}...)"
        for cause in self.differences or ([] if self.same_bytes else ["nothing that run.json records"]):
            yield f"{'differs' if self.same_bytes else 'possible cause'}: {cause}"

    def write(self) -> None:
        """Write reproduction.json into the new run. Raises MachineError."""
        values = {"of": str(self.old), "same_bytes": self.same_bytes, "sha256": self.digests}
        values |= {"metrics": self.metrics, "differences": self.differences}
        write_atomically(self.new / "reproduction.json", to_json(values))


def reproduce(old: Path, new: Path, tolerance: float, *, verbose: bool = True) -> Reproduction:
    """Repeat the run `old` in the folder `new`, or resume it there, and compare both; with `verbose`, print.

    Every process of a launch must call this. Raises UsageError if the run is not done, DataError if its data has
    changed, and ArtifactError, after the comparison is written, if a metric differs by more than the tolerance.
    """
    if old.resolve() == new.resolve():
        raise UsageError(f"--output-dir {new}: that is the run itself; choose another folder")
    facts = read_facts(old)
    if facts.get("status") != "done":
        raise UsageError(f"{old}: this run is not done (status {facts.get('status')}); resume it first")
    again = config_again(old, new)
    accelerator, _ = start(again.system, again.run.seed)
    plan = make_plan(accelerator, again)
    on_main(accelerator, lambda: check_same_data(old, facts, plan))
    run_training(again, verbose=verbose)
    reproduction = on_main(accelerator, lambda: compared(old, new))
    display = Display(accelerator.is_main_process, verbose)
    for line in ("", *reproduction.lines()):
        display.say(line)
    on_main(accelerator, lambda: check_metrics(reproduction, tolerance))
    return reproduction


def config_again(old: Path, new: Path) -> TrainConfig:
    """The config of a run, with the output folder `new`. Raises UsageError."""
    cfg: TrainConfig = resolve(TrainConfig, {"resume": str(old)})
    run = dataclasses.replace(cfg.run, output_dir=str(new), resume="auto")
    return dataclasses.replace(cfg, run=run)


def check_same_data(old: Path, facts: Mapping[str, Any], plan: Plan) -> None:
    """Raises DataError if paths, classes, splits or sizes of the images have changed since the run."""
    before, now = facts.get("data"), what_is_trained(plan)["data"]
    if before == now:
        return
    if not isinstance(before, dict):
        raise UsageError(f"{old / 'run.json'}: no data fingerprint; the run was made by a version before it had one")
    changed = [name for name in ("images", "bytes") if before.get(name) != now[name]]
    changes = [f"{name} {before.get(name)} -> {now[name]}" for name in changed]
    what = ", ".join(changes) or "other paths, classes or splits"
    raise DataError(
        f"{old}: its data has changed since ({what}); restore the images that {old / 'data/manifest.csv'} lists"
    )


def compared(old: Path, new: Path) -> Reproduction:
    """Compare two runs, and write reproduction.json into the new one. Raises UsageError, ArtifactError."""
    before, after = read_facts(old), read_facts(new)
    reproduction = Reproduction(
        old,
        new,
        metrics={name: (before["best"][name], after["best"][name]) for name in (*COMPARED, "loss")},
        digests=[digest(run / "checkpoints" / "best.safetensors") for run in (old, new)],
        differences=list(differences(before["launches"][-1], after["launches"][-1])),
    )
    reproduction.write()
    return reproduction


def check_metrics(reproduction: Reproduction, tolerance: float) -> None:
    """Raises ArtifactError if a metric differs by more than the tolerance."""
    furthest = reproduction.furthest
    if furthest > tolerance or math.isnan(furthest):
        raise ArtifactError(
            f"{reproduction.new}: the metrics differ by up to {furthest:.4f}, more than --tolerance {tolerance:g}"
        )


def digest(file: Path) -> str:
    """The sha256 of a file. Raises ArtifactError."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None


def differences(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What differs between two launches and may change the result, as `name old -> new`."""
    for name in sorted((before.keys() | after.keys()) - {"command"}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{name} ")
        elif old != new:
            yield f"{where}{name} {old} -> {new}"
