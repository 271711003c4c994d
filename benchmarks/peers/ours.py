"""`resnet-dist train` itself, in this process; the clock is put behind its optimizer step. Options go to the verb."""

import contextlib
import csv
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer

from resnet_dist.cli.main import main
from resnet_dist.training import loop

RECIPES = {
    "full": ["--recipe", "full-finetune", "--opt", "sgd"],
    "head": ["--recipe", "feature-extractor-bn-eval", "--aug", "none"],
}
OPTIONS = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


def train(job: peer.Job, tick: Callable[[], None]) -> float:
    """The whole verb: run folder, validation, plots and checkpoints included. Its last epoch's top-1 on val/."""
    update: Any = loop.update

    def update_and_tick(*arguments: Any) -> None:
        update(*arguments)
        tick()

    with tempfile.TemporaryDirectory(prefix="resnet-dist-peers-") as folder, contextlib.redirect_stdout(sys.stderr):
        run = Path(folder) / "run"
        arguments = ["train", str(job.data), "--model", "resnet18", "--weights", str(job.weights), *RECIPES[job.kind]]
        arguments += ["--epochs", str(job.epochs), "--batch-size", str(job.batch_size), "--lr", str(peer.LR[job.kind])]
        arguments += ["--seed", str(job.seed)]
        loop.update = update_and_tick
        if main([*arguments, *OPTIONS, "-o", str(run)]):
            sys.exit("resnet-dist train failed")
        with (run / "metrics.csv").open(newline="") as stream:
            return float(list(csv.DictReader(stream))[-1]["val_top1"])


if __name__ == "__main__":
    peer.run(train, ["resnet-dist", "torchvision"])
