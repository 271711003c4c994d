"""`resnet-dist reproduce`: do a run again from what it wrote down, and say what differs."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.config.fields import option, out_of_range
from resnet_dist.config.layers import resolve
from resnet_dist.config.schema import TrainConfig
from resnet_dist.errors import ArtifactError, DataError, UsageError

if TYPE_CHECKING:
    from resnet_dist.training.job import Blueprint

COMPARED = ("top1", "top5", "macro_f1")  # the metrics that --tolerance is about


@dataclass(frozen=True, kw_only=True)
class Config:
    """Do a run again from its config.toml on the same data; compare the metrics and the bytes of the best checkpoint.

    On the same CPU, versions and threads the bytes are the same. The exit code is 0 as long as top-1, top-5 and
    macro-F1 are within --tolerance, whether the bytes are the same or not, else 6.
    """

    run: str | None = option(None, positional=True)
    """A run folder whose training is done."""
    output_dir: str | None = option(None, "-o", "--output")
    """The folder of the new run (default: RUN-again); the same command goes on with an interrupted one."""
    tolerance: float = 0.01
    """The largest difference of top-1, top-5 and macro-F1 (each 0..1) that is accepted."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder"
        yield from out_of_range(self, 0, 1, "tolerance")


def main(cfg: Config) -> int:
    """Train again, compare, print, and write reproduction.json. Returns the exit code.

    Raises UsageError where the run is not done, DataError where its data is another, ArtifactError where the metrics
    differ by more than the tolerance.
    """
    from resnet_dist.files.run import read_facts
    from resnet_dist.runtime.accelerate import on_main, start
    from resnet_dist.training.job import draw
    from resnet_dist.training.run import run_training

    old = Path(cfg.run or "")
    new = Path(cfg.output_dir) if cfg.output_dir is not None else old.with_name(f"{old.name}-again")
    if old.resolve() == new.resolve():
        raise UsageError(f"--output-dir {new}: that is the run itself; choose another folder")
    facts = read_facts(old)
    if facts.get("status") != "done":
        raise UsageError(f"{old}: this run is not done (status {facts.get('status')}); resume it first")
    again = as_it_was(old, facts, new)
    accelerator, _ = start(again.system, again.run.seed)
    blueprint = draw(accelerator, again)
    on_main(accelerator, lambda: check_same_data(old, facts, blueprint))
    run_training(again)
    on_main(accelerator, lambda: report(old, new, cfg.tolerance))
    return 0


def as_it_was(old: Path, facts: Mapping[str, Any], new: Path) -> TrainConfig:
    """The config of a run, to be done again in `new`. Raises UsageError."""
    cfg: TrainConfig = resolve(TrainConfig, {"resume": str(old)})
    run = dataclasses.replace(cfg.run, output_dir=str(new), resume="auto")
    return dataclasses.replace(cfg, run=run)


def check_same_data(old: Path, facts: Mapping[str, Any], blueprint: "Blueprint") -> None:
    """Raises DataError unless paths, classes, splits and sizes are those of the run."""
    from resnet_dist.training.facts import what_is_trained

    before, now = facts.get("data"), what_is_trained(blueprint)["data"]
    if before == now:
        return
    if not isinstance(before, dict):
        raise UsageError(f"{old / 'run.json'}: no data fingerprint; the run was made by a version before it had one")
    changed = [name for name in ("images", "bytes") if before.get(name) != now[name]]
    changes = [f"{name} {before.get(name)} -> {now[name]}" for name in changed]
    what = ", ".join(changes) or "other paths, classes or splits"
    raise DataError(f"{old}: its data is no longer the same ({what}); put back what {old / 'data/manifest.csv'} lists")


def report(old: Path, new: Path, tolerance: float) -> None:
    """Say what differs, and write it into reproduction.json of the new run. Raises ArtifactError beyond tolerance."""
    from resnet_dist.files.run import read_facts, to_json, write_atomically

    before, after = read_facts(old), read_facts(new)
    metrics = {name: (before["best"][name], after["best"][name]) for name in (*COMPARED, "loss")}
    digests = [digest(run / "checkpoints" / "best.safetensors") for run in (old, new)]
    causes = list(differences(before["launches"][-1], after["launches"][-1]))
    same = digests[0] == digests[1]
    print()
    for name, (was, value) in metrics.items():
        print(f"{name:<9} {was:.6f} -> {value:.6f}  {'same' if was == value else f'{value - was:+.6f}'}")
    print(f"best.safetensors: {'the same bytes' if same else 'other bytes'} (sha256 {digests[1][:16]}...)")
    for cause in causes or ([] if same else ["nothing that run.json records"]):
        print(f"{'differs' if same else 'what may be why'}: {cause}")
    facts = {"of": str(old), "same_bytes": same, "sha256": digests, "metrics": metrics, "differences": causes}
    write_atomically(new / "reproduction.json", to_json(facts))
    furthest = max(abs(metrics[name][1] - metrics[name][0]) for name in COMPARED)
    if furthest > tolerance or math.isnan(furthest):
        raise ArtifactError(f"{new}: the metrics differ by up to {furthest:.4f}, more than --tolerance {tolerance:g}")


def digest(file: Path) -> str:
    """The sha256 of a file. Raises ArtifactError."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from None


def differences(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What two launches do not have in common and may change the result, as `name old -> new`."""
    for name in sorted((before.keys() | after.keys()) - {"command"}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{name} ")
        elif old != new:
            yield f"{where}{name} {old} -> {new}"
