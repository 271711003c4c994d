"""An interrupted run that is resumed ends in the same bits as one that nobody interrupted."""

import csv
import hashlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest
from safetensors.torch import load_file

from resnet_dist.cli.main import main
from resnet_dist.training.state import newest_state
from tests.conftest import TINY, made_once
from tests.launch.helpers import LAUNCH
from tests.runtime.launch import exit_codes
from tests.training.interrupted import interrupt

# Everything that is random or remembered: 24 images, three steps in an epoch, nine in all, two phases.
EVERYTHING = [*TINY, "--recipe", "head-then-all", "--phase", "1.epochs=1", "--epochs", "3", "--global-batch-size", "8"]
EVERYTHING += ["--lr", "0.02", "--lr-scheduler", "cosine", "--opt", "sgd", "--clip-grad", "1", "--head", "mlp"]
EVERYTHING += ["--dropout", "0.3", "--mixup", "0.4", "--aug", "trivial", "--ema", "--smoothing", "0.1"]
EVERYTHING += ["--log-every", "1", "--save-every", "2steps"]
LAUNCHED = ["accelerate", "launch", "--config_file", str(LAUNCH / "cpu.yaml"), "-m"]


def launched(processes: int, *arguments: str | Path, module: str = "resnet_dist", **variables: str) -> list[int | None]:
    """The exit code of the program in each of its processes."""
    codes, said = exit_codes(processes, module, *arguments, timeout=150, **variables)
    assert "Traceback" not in said, said
    return codes


@pytest.fixture(scope="session")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run that nobody interrupts, by number of processes; made once. The file `seconds` beside it has its time."""

    def get(processes: int) -> Path:
        def make(place: Path) -> None:
            arguments, began = ["train", str(folder), *EVERYTHING, "-o", str(place / "run")], time.monotonic()
            assert (main(arguments) if processes == 1 else launched(processes, *arguments)) in (0, [0, 0])
            (place / "seconds").write_text(str(time.monotonic() - began))

        return made_once(tmp_path_factory, f"uninterrupted-{processes}", make) / "run"

    return get


def outcome(run: Path) -> dict[str, Any]:
    """All that a run came to, apart from times: its losses step by step, its epochs, its best and last weights."""
    with (run / "metrics.csv").open(newline="") as stream:
        epochs = list(csv.DictReader(stream))
    for row in epochs:
        del row["train_seconds"], row["train_images_per_second"]
    newest = newest_state(run / "checkpoints")
    assert newest is not None and newest.name == "step-000000009"
    best = hashlib.sha256()  # not of the file, whose description holds the number of loader processes
    for name, tensor in sorted(load_file(run / "checkpoints/best.safetensors").items()):
        best.update(name.encode() + tensor.numpy().tobytes())
    last = hashlib.sha256((newest / "state.safetensors").read_bytes())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"steps": steps, "epochs": epochs, "best": best.hexdigest(), "last": last.hexdigest()}


def facts(run: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((run / "run.json").read_text())
    return known


def stopped_after(run: Path) -> int:
    """The optimizer steps of the newest checkpoint."""
    newest = newest_state(run / "checkpoints")
    assert newest is not None
    return int(newest.name.removeprefix("step-"))


# Processes, loader processes, where, how: every pair of values of two of them occurs.
IN_EVERY_SUITE = [(1, 2, "epoch end", SIGTERM), (2, 0, "mid-epoch", SIGKILL)]
CELLS = [*IN_EVERY_SUITE, (1, 0, "phase edge", SIGKILL), (2, 2, "phase edge", SIGTERM), (1, 2, "mid-epoch", SIGKILL)]
CELLS += [(2, 0, "epoch end", SIGKILL), (1, 0, "mid-epoch", SIGTERM)]


def test_every_pair_of_circumstances_is_tried() -> None:
    values = ((1, 2), (0, 2), ("mid-epoch", "epoch end", "phase edge"), (SIGTERM, SIGKILL))
    for a, b in itertools.combinations(range(4), 2):
        assert {(cell[a], cell[b]) for cell in CELLS} == set(itertools.product(values[a], values[b]))


@pytest.mark.parametrize(
    ("processes", "workers", "point", "number"),
    [pytest.param(*cell, marks=[] if cell in IN_EVERY_SUITE else pytest.mark.matrix) for cell in CELLS],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_resumed_run_equals_the_uninterrupted_one(
    processes: int,
    workers: int,
    point: str,
    number: signal.Signals,
    folder: Path,
    tmp_path: Path,
    uninterrupted: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same losses, scores, best and last weights, bit for bit; with another number of loader processes after it."""
    run = tmp_path / "run"
    arguments = ["train", str(folder), *EVERYTHING, "--workers", str(workers), "-o", str(run)]
    if processes == 1 and number == SIGTERM:
        with monkeypatch.context() as patch:
            interrupt(point, lambda: os.kill(os.getpid(), number), patch.setattr)
            assert main(arguments) == 75
    else:
        how = [point, int(number), {1: 0, 2: 1}[processes]]
        codes = launched(processes, *map(str, how), *arguments, module="tests.training.interrupted")
        assert codes == ([75] * processes if number == SIGTERM else [4, -9][2 - processes :])
    assert 2 <= stopped_after(run) < 8
    assert facts(run)["status"] == {SIGTERM: "preempted", SIGKILL: "failed" if processes == 2 else "running"}[number]
    arguments = ["train", "--resume", str(run), "--workers", str(2 - workers)]
    assert (main(arguments) if processes == 1 else launched(processes, *arguments)) in (0, [0, 0])
    assert facts(run)["status"] == "done"
    assert outcome(run) == outcome(uninterrupted(processes))
