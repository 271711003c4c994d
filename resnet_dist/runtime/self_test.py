"""A test that training and evaluation with two processes give the same as with one, on tiny images on the CPU."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from resnet_dist.errors import MachineError
from resnet_dist.runtime.subprocesses import run_program
from resnet_dist.runtime.wording import counted

TIMEOUT = 300  # seconds
# BatchNorm's statistics are frozen: without SyncBatchNorm, which needs GPUs, each process would use its own batch.
TRAINING = """
--model resnet18 --weights none --stem small --head mlp --dropout 0.2 --batch-norm-stats frozen --trainable layer4,head
--img-size 16 --mixup 0.2 --epochs 3 --global-batch-size 8 --lr 0.01 --sched cosine --log-every 1 --threads 1
--mixed-precision no --workers 0
"""


def self_test(folder: Path) -> Iterator[str]:
    """Train and evaluate with one process and with two, in `folder`; yields a line for each result that is equal.

    Raises MachineError if a result differs or a process fails.
    """
    _write_images(folder / "images")
    one, two = folder / "one", folder / "two"
    _train(folder, one, processes=1)
    _train(folder, two, processes=2)
    steps = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    yield _equal("learning rates of all steps", *[[row["lr"] for row in rows] for rows in steps])
    losses = [[row["loss"] for row in rows] for rows in steps]
    worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    if worst > 1e-4:
        raise MachineError(
            f"self-test: the losses of one and two processes differ by {worst:.1e}; see launch/README.md"
        )
    yield f"losses of {counted(len(losses[0]), 'step')}: equal within {worst:.1e}"
    evaluations = []
    for processes in (1, 2):
        out = folder / f"eval{processes}"
        arguments = ["eval", str(one), "--output-dir", str(out), "--batch-size", "3", "--threads", "1"]
        _run(arguments, processes)
        with (out / "predictions.csv").open(newline="") as stream:
            evaluations.append([(row["path"], row["target"], row["prediction"]) for row in csv.DictReader(stream)])
    yield _equal(f"predictions for {len(evaluations[0])} images, every one once", *evaluations)


def _equal(what: str, one: object, two: object) -> str:
    if one != two:
        raise MachineError(f"self-test: {what} differ between one and two processes; see launch/README.md")
    return f"{what}: equal"


def _write_images(folder: Path) -> None:
    """Write noise images of two classes: 13 for training and 7 for validation, which no batch size here divides."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 7)):
        for number in range(count):
            pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            pixels[..., number % 2] //= 3
            file = folder / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def _train(folder: Path, run: Path, processes: int) -> None:
    _run(["train", str(folder / "images"), *TRAINING.split(), "--output-dir", str(run)], processes)


def _run(arguments: Sequence[str], processes: int) -> None:
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run_program("self-test", arguments, processes if processes > 1 else None, variables, TIMEOUT)
