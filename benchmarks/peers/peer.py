"""What the peers' scripts share: their job, the clock that counts steps, evaluation, and what they report as JSON.

A script defines `train(job, tick) -> top1`: it trains as its library's own example does, calls `tick()` after every
optimizer step and returns the accuracy of its last validation. With `--steps N`, the clock ends it after so many steps.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LR = {"full": 1e-3, "head": 1e-2}  # SGD with momentum 0.9, those of the tutorials


class Enough(Exception):  # noqa: N818 - not an error: the clock has seen the steps that it was to time
    """Training need not go on."""


class Job(NamedTuple):
    """Fine-tune a resnet18 with ImageNet's weights: everything with random crops, or the head without any."""

    kind: str  # "full" or "head"
    data: Path
    weights: Path
    epochs: int
    batch_size: int
    seed: int
    size: int = 224

    @property
    def classes(self) -> int:
        """How many there are."""
        return sum(folder.is_dir() for folder in (self.data / "train").iterdir())


class Clock:
    """Notes when every optimizer step ended; waits for a GPU before the first step that counts and after the last."""

    def __init__(self, steps: int | None, warmup: int) -> None:
        self.steps, self.warmup = steps, max(1, warmup)
        self.ends: list[float] = []

    def tick(self) -> None:
        """Called after every step. Raises Enough after the last that is to be timed."""
        number = len(self.ends) + 1
        is_last = self.steps is not None and number == self.warmup + self.steps
        if DEVICE.type == "cuda" and (is_last or number == self.warmup):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if is_last:
            raise Enough("the clock has seen its steps")  # fastai reads the first argument

    def seconds(self) -> list[float]:
        """Of the steps after the warm-up, with the loading between them; on a GPU their mean, which alone is known."""
        ends = self.ends[self.warmup - 1 :]
        if DEVICE.type == "cuda":
            return [(ends[-1] - ends[0]) / (len(ends) - 1)]
        return [after - before for before, after in pairwise(ends)]


Train = Callable[[Job, Callable[[], None]], float]


def run(train: Train, packages: Sequence[str]) -> None:
    """Read the command line, train, and write the JSON file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", choices=("full", "head"), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    options, _ = parser.parse_known_args()
    job = Job(options.job, options.data, options.weights, options.epochs, options.batch_size, options.seed)
    random.seed(job.seed)
    torch.manual_seed(job.seed)
    clock = Clock(options.steps, options.warmup)
    start = time.perf_counter()
    top1 = None
    with suppress(Enough):
        top1 = train(job, clock.tick)
    seconds = time.perf_counter() - start
    median = statistics.median(clock.seconds())
    found: dict[str, Any] = {
        "step_seconds": median,
        "images_per_second": job.batch_size / median,
        "steps": len(clock.ends) - clock.warmup,
        "train_seconds": seconds,
        "top1": top1,
        "peak_memory_mib": peak_memory_mib(),
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated() >> 20 if DEVICE.type == "cuda" else 0,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", *packages)},
    }
    options.json.write_text(json.dumps(found) + "\n")


def peak_memory_mib() -> int:
    """Of this process, without its loader processes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def with_weights(model: nn.Module, job: Job) -> nn.Module:
    """Put the weights into a resnet18 of torchvision's or timm's, which name them alike; the head stays new."""
    tensors = {name: value for name, value in load_file(job.weights).items() if not name.startswith("fc.")}
    left_out = model.load_state_dict(tensors, strict=False)
    assert {name.split(".")[0] for name in left_out.missing_keys} == {"fc"} and not left_out.unexpected_keys
    if job.kind == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("fc."))
    return model.to(DEVICE)


def torchvision_model(job: Job) -> nn.Module:
    """torchvision's resnet18 with the job's weights."""
    return with_weights(resnet18(num_classes=job.classes), job)


def eval_transform(job: Job) -> v2.Compose:
    """PIL image to input: the geometry of ImageNet's evaluation."""
    steps = [v2.Resize(256), v2.CenterCrop(job.size), v2.PILToTensor()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def train_mode(model: nn.Module, job: Job) -> None:
    """Training mode; where only the head learns, evaluation mode for the rest, so that the job is the same for all."""
    model.train(job.kind == "full")


@torch.inference_mode()
def evaluate(model: nn.Module, job: Job) -> float:
    """Top-1 on val/."""
    images = ImageFolder(job.data / "val", eval_transform(job))
    model.eval()
    correct = 0
    for inputs, targets in DataLoader(images, batch_size=job.batch_size, num_workers=2):
        correct += int((model(inputs.to(DEVICE)).argmax(1) == targets.to(DEVICE)).sum())
    return correct / len(images)
