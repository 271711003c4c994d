"""The training step alone, on pixels that are on the GPU already: models, precisions and batch sizes in one process.

    python benchmarks/gpu_steps.py --json steps.json --models resnet18 resnet50 --precisions bf16 fp16

Every row is `train_step` of the program itself: images/s, milliseconds, the share of that time in which the host gives
out work (near 1: launch-bound), and how near the step comes to the roofline of the measured products and copies. The
file is written after every row. Under torchrun with one process, the network is wrapped in DDP. On a machine without a
GPU it runs on the CPU, to see that it does.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.bench.machine import describe, roofs
from resnet_dist.bench.synthetic import photographs
from resnet_dist.bench.timing import Repeats, measure
from resnet_dist.bench.training import begin, job_of, limits, work
from resnet_dist.cli.parser import parse
from resnet_dist.config.schema import TrainConfig
from resnet_dist.data.transforms import Batch
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import start
from resnet_dist.training.job import Job
from resnet_dist.training.loop import Learner, end_phase, train_step
from resnet_dist.training.plan import make_plan

REPEATS = Repeats(windows=3, steps=None, warmup=12)


def main() -> None:
    """Measure every combination, print and write its row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--precisions", nargs="+", default=["bf16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--options", default="", help="further options of train, such as '--ema --compile on'")
    options = parser.parse_args()
    if launcher.is_distributed() and launcher.world_size() == 1:  # Accelerate wraps nothing for a group of one
        PartialState.use_distributed = property(lambda _: True)  # type: ignore[assignment]
    found: dict[str, Any] = {"options": options.options, "rows": []}
    for model, precision, size in product(options.models, options.precisions, options.batch_sizes):
        words = ["--model", model, "--mixed-precision", precision, "--batch-size", str(size), "--compile", "off"]
        words += ["--img-size", str(options.img_size), *options.options.split()]
        row = {"model": model, "precision": precision, "batch_size": size} | row_of(words, found)
        found["rows"].append(row)
        if launcher.rank() == 0:
            print({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}, flush=True)
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def row_of(words: list[str], found: dict[str, Any]) -> dict[str, Any]:
    """What is measured with these options of train; the first call also measures the machine, into `found`."""
    try:
        with learner_of(words) as (job, learner):
            if "roofs" not in found:
                found |= {"machine": describe(job.accelerator), "roofs": roofs(job.accelerator, REPEATS)}
            batches = [random_batch(job).to(job.accelerator.device)]
            if job.accelerator.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            timing = measure(job.accelerator, lambda: train_step(job, learner, batches), REPEATS)
            step = timing.of_images(job.plan.share.batch_size)
            measured = {"compute": {"step": step}, "work": work(job, learner, batches[0], found["roofs"])}
            reached = limits(job.accelerator, measured, found["roofs"])
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    peak = torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None
    names = ("seconds", "p10", "p90", "host_share", "images_per_second")
    return {name: step[name] for name in names} | reached | {"ddp": is_ddp(learner), "gpu_mib": peak}


def is_ddp(learner: Learner) -> bool:
    """Whether gradients are averaged over the processes."""
    return isinstance(learner.net, DistributedDataParallel)


@contextmanager
def learner_of(words: list[str]) -> Iterator[tuple[Job, Learner]]:
    """A job of `resnet-dist train` with these options and a few files, and its network ready to take steps."""
    with tempfile.TemporaryDirectory(prefix="resnet-dist-steps-") as folder:
        photographs(Path(folder), 4)
        fixed = ["--weights", "none", "--workers", "0", "--cache", "none"]
        cfg: TrainConfig = parse(TrainConfig, [folder, *fixed, *words], "train")
        accelerator, _ = start(cfg.system)
        job, learner = begin(job_of(accelerator, make_plan(accelerator, cfg)), "full", 2)
        yield job, learner
        end_phase(job, learner)


def random_batch(job: Job) -> Batch:
    """A batch of the job's size with random pixels, some of its images to be mirrored."""
    size, side = job.plan.share.batch_size, job.plan.spec.img_size
    images = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8)
    number = torch.arange(size)
    batch = Batch(images, number % len(job.plan.index.classes), number % len(job.plan.index.train), number + 1)
    return dataclasses.replace(batch, flip=number % 2 == 0)


if __name__ == "__main__":
    main()
