"""`resnet-dist bench ladder`: training with all optimisations off, then with one more each time."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from resnet_dist.bench.frame import Result, Setup, run_measurement
from resnet_dist.bench.machine import describe
from resnet_dist.bench.options import LadderConfig
from resnet_dist.bench.training import begin, job_of, shortened, whole_training
from resnet_dist.config.schema import TrainConfig
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import start
from resnet_dist.training.loop import end_phase


@dataclass(frozen=True)
class Rung:
    """One optimisation, on top of all rungs below it: the fields that it changes, by section, and what learns."""

    name: str
    changes: dict[str, dict[str, Any]]
    regime: str = "full"


GROUND = Rung(
    "float32, one thread, no caches",
    {
        "system": {"mixed_precision": "no", "tf32": False, "threads": 1, "cache_features": "off", "compile": "off"},
        "data": {"workers": 0, "cache": "none"},
    },
)
LEVERS = (
    Rung("all cores", {"system": {"threads": None}, "data": {"workers": None}}),
    Rung("bf16 or fp16 if the machine has it", {"system": {"mixed_precision": "auto", "tf32": True}}),
    Rung("decoded images cached in memory", {"data": {"cache": "ram"}}),
    Rung("compiled", {"system": {"compile": "on"}}),
    Rung("only layer4 and head learn", {"system": {"compile": "off"}}, "layer4+head"),
    Rung("no augmentation", {"augment": {"aug": "none"}}, "layer4+head"),
    Rung("features before layer4 cached", {"system": {"cache_features": "auto"}}, "layer4+head"),
    Rung("only the head learns, from cached features", {}, "head"),
)


def run_ladder(cfg: LadderConfig) -> None:
    """Measure, print the table and write the JSON file. Every process must call this. Raises ResnetDistError."""
    run_measurement(cfg, lambda setup: measure(cfg, setup))


def measure(cfg: LadderConfig, setup: Setup) -> Result:
    """The speed of every rung, as plain JSON values and as text."""
    rows = climb(setup.cfg, cfg.rounds, cfg.epochs, setup.steps, setup.say)
    return Result({"machine": describe(setup.accelerator), "rungs": rows}, list(lines(rows)))


def climb(cfg: TrainConfig, rounds: int, epochs: int, steps: int, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Images per second of every rung, after the first epoch. Each round measures all rungs; `say` reports progress.

    Starts an Accelerator for each rung, because precision and threads differ. Every process must call this.
    """
    on_gpu = torch.accelerator.is_available() and not launcher.cpu_is_asked_for()
    # On a CPU, compiling takes longer than everything else here, and the compiled steps were measured to be slower.
    levers = [lever for lever in LEVERS if on_gpu or lever.name != "compiled"]
    rungs = list(_cumulated(cfg, (GROUND, *levers)))
    rates_of: list[list[float]] = [[] for _ in rungs]
    for number in range(rounds):
        for rates, (rung, changed) in zip(rates_of, rungs, strict=True):
            say(f"round {number + 1} of {rounds}: {rung.name}")
            accelerator, _ = start(changed.system, changed.run.seed)
            rates.append(_images_per_second(accelerator, changed, rung.regime, epochs, steps))
    return [_row(rung, rates) for (rung, _), rates in zip(rungs, rates_of, strict=True)]


def _cumulated(cfg: TrainConfig, rungs: Sequence[Rung]) -> Iterator[tuple[Rung, TrainConfig]]:
    for rung in rungs:
        sections = {name: dataclasses.replace(getattr(cfg, name), **changed) for name, changed in rung.changes.items()}
        cfg = dataclasses.replace(cfg, **sections)
        yield rung, cfg


def _images_per_second(accelerator: Accelerator, cfg: TrainConfig, regime: str, epochs: int, steps: int) -> float:
    job, learner = begin(job_of(accelerator, shortened(accelerator, cfg, steps)), regime, epochs)
    rate = whole_training(job, learner, epochs)["later_epochs"]["images_per_second"]
    end_phase(job, learner)
    return float(rate)


def _row(rung: Rung, rates: list[float]) -> dict[str, Any]:
    return {
        "rung": rung.name,
        "regime": rung.regime,
        "images_per_second": float(np.median(rates)),
        "lowest": min(rates),
        "highest": max(rates),
        "rounds": len(rates),
    }


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The ladder as text: each rung with its gain over the rung below and over the first."""
    yield f"{'':<40}{'images/s':>10}{'lowest':>10}{'highest':>10}{'gain':>8}{'total':>8}"
    ground = before = rows[0]["images_per_second"]
    for row in rows:
        rate = row["images_per_second"]
        spread = f"{row['lowest']:>10,.1f}{row['highest']:>10,.1f}"
        yield f"{row['rung']:<40}{rate:>10,.1f}{spread}{rate / before:>7.2f}x{rate / ground:>7.2f}x"
        before = rate
