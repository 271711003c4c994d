"""The program, with a fault at a given point of one process; and what it read, for tests that ask.

python -m tests.training.interrupted POINT FAULT RANK train ARGUMENTS...: the process of this rank (no process, for
"none") sends itself the signal of this number, or meets one of FAULTS. With RECORD=FOLDER in the environment every
process writes the samples of each batch that it loads, as a line of JSON.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

import resnet_dist.training.loop as loop
from resnet_dist.data.loader import Keys, TrainImages
from resnet_dist.runtime import environment as launcher
from resnet_dist.training.losses import Loss

# Where to interrupt: a function of the loop, and after how many calls of it. Three steps make an epoch, the first epoch
# is a phase of its own, and every epoch is validated twice (the weights and their average).
POINTS = {
    "start": ("begin_phase", 1),
    "mid-epoch": ("train_step", 5),
    "epoch end": ("validate", 3),  # between the two validations of the second epoch
    "phase edge": ("begin_phase", 2),
}


def interrupted(function: Callable[..., Any], calls: int, action: Callable[[], object]) -> Callable[..., Any]:
    """The function, followed by the action after that many calls."""
    left = [calls]

    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        left[0] -= 1
        if left[0] == 0:
            action()
        return result

    return call


def interrupt(point: str, action: Callable[[], object], replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Do this at a point of POINTS; `replace` is a monkeypatch's setattr where it is to be undone."""
    name, calls = POINTS[point]
    replace(loop, name, interrupted(getattr(loop, name), calls, action))


def record(file: Path, replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Write the samples of every training batch that this process loads."""
    load = TrainImages.__getitems__

    def recorded(self: TrainImages, keys: Keys) -> object:
        with file.open("a") as stream:
            stream.write(json.dumps(np.asarray(keys).tolist()) + "\n")
        return load(self, keys)

    replace(TrainImages, "__getitems__", recorded)


def out_of_memory() -> NoReturn:
    raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")


def poison() -> None:
    """From now on the losses of this process are NaN."""
    real = Loss.numerators
    Loss.numerators = lambda self, *rest: real(self, *rest) * float("nan")  # type: ignore[method-assign]


FAULTS = {"out of memory": out_of_memory, "nan": poison}

if __name__ == "__main__":
    from resnet_dist.cli.main import entry

    point, fault, rank = sys.argv[1:4]
    sys.argv[1:4] = []
    if rank == str(launcher.rank()):
        interrupt(point, FAULTS.get(fault) or (lambda: os.kill(os.getpid(), int(fault))))
    if "RECORD" in os.environ:
        record(Path(os.environ["RECORD"]) / f"{launcher.rank()}.jsonl")
    entry()
