"""Loading by itself, stage by stage: from reading files to the network's input on the device."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

from resnet_dist.bench.timing import Plan, measure, wait_for
from resnet_dist.data.transforms import Batch, sample_key, training_pixels
from resnet_dist.train.job import Job


def stages(job: Job, plan: Plan) -> dict[str, Any]:
    """Images per second of each stage with those before it, in one process: read, decode, transform, batch (collate).

    The files have been read once before, so they come from the system's cache where they fit. Every window takes the
    next batch of the table.
    """
    images, size = job.train_images, job.cfg.data.batch_size
    table, positions = images.table, cycle(range(len(images.table)))

    def batch_of(work: Any) -> Any:
        return lambda: [work(next(positions)) for _ in range(size)]

    def transform(index: int) -> object:
        key = sample_key(job.cfg.run.seed, 0, index)
        return training_pixels(images.read(index), key, images.transform, images.cfg.hflip)

    steps = {
        "read": batch_of(lambda index: (table.root / table.paths[index]).read_bytes()),
        "decode": batch_of(images.read),
        "transform": batch_of(transform),
        "batch": lambda: images.__getitems__([(0, next(positions)) for _ in range(size)]),
    }
    return {name: measure(job.accelerator, step, plan).of_images(size) for name, step in steps.items()}


def loaders(job: Job, plan: Plan) -> dict[str, Any]:
    """Images per second of the loop's own loader with its processes, to the host and to the input on the device."""
    size, device = job.cfg.data.batch_size, job.accelerator.device
    arriving = _endless(job)

    def to_device() -> None:
        job.to_input(next(arriving).to(device))

    found = {
        "loader": measure(job.accelerator, lambda: next(arriving), plan).of_images(size),
        "input": measure(job.accelerator, to_device, plan).of_images(size),
    }
    wait_for(device)
    return found


def _endless(job: Job) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    epoch = 0
    while True:
        for batches in job.train_loader.epoch(epoch):
            yield from batches
        epoch += 1
