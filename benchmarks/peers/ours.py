"""`resnet_dist.train` itself, in this process; the clock is put behind its optimizer step.

Options of `resnet-dist train` may follow `--`.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer

import resnet_dist as rd
from resnet_dist.cli.parser import typed
from resnet_dist.config.schema import TrainConfig
from resnet_dist.training import loop

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"recipe": "full-finetune", "opt": "sgd"},
    "head": {"recipe": "feature-extractor-bn-eval", "aug": "none"},
}
OPTIONS = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


def train(job: peer.Job, tick: Callable[[], None]) -> float:
    """The whole training: run folder, validation, plots and checkpoints included. Its last epoch's top-1 on val/."""
    update: Any = loop.update

    def update_and_tick(*arguments: Any) -> None:
        update(*arguments)
        tick()

    settings = {
        "model": "resnet18",
        "weights": job.weights,
        "epochs": job.epochs,
        "batch_size": job.batch_size,
        "lr": peer.LR[job.kind],
        "seed": job.seed,
        **RECIPES[job.kind],
        **typed(TrainConfig, OPTIONS, "resnet-dist train").given,
    }
    with tempfile.TemporaryDirectory(prefix="resnet-dist-peers-") as folder:
        loop.update = update_and_tick
        run = rd.train(job.data, **settings, output_dir=Path(folder) / "run")
        if run is None:
            sys.exit("--dry-run trains nothing")
        return run.epochs[-1]["val_top1"]


if __name__ == "__main__":
    peer.run(train, ["resnet-dist", "torchvision"])
