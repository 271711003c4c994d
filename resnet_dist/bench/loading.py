"""Loading by itself, stage by stage: from reading files, or from what is kept, to the network's input on the device."""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

from resnet_dist.bench.timing import Plan, measure
from resnet_dist.data.loader import DeviceImages, Samples, TrainImages, TrainLoader
from resnet_dist.data.transforms import Batch, sample_key, training_pixels
from resnet_dist.training.job import Job


def loading(job: Job, plan: Plan) -> dict[str, Any]:
    """Images per second of each stage with those before it, from files and, where the job keeps images, from those.

    "from_device" is there instead of "from_kept" where the job keeps them on the device. The files have been read
    before, so they come from the system's cache where they fit.
    """
    kept = job.train_images
    plain = TrainImages(kept.table, kept.spec, kept.cfg, kept.seed)
    found = {"from_files": {**_stages(job, plain, plan), **_loops(job, plain, plan)}}
    if isinstance(job.train_loader.samples, DeviceImages):
        found["from_device"] = _loops(job, job.train_loader.samples, plan)
    elif kept.read is not kept.reader:
        for _ in job.train_loader.epoch(0):  # fills it
            pass
        found["from_kept"] = {"get": _get(job, kept.read, kept, plan), **_loops(job, kept, plan)}
    return found


def _stages(job: Job, images: TrainImages, plan: Plan) -> dict[str, Any]:
    """In one process: read, decode, transform (geometry and colour), batch (collate)."""
    table = images.table

    def transform(index: int) -> object:
        key = sample_key(images.seed, 0, index)
        return training_pixels(images.reader(index), key, images.transform, images.cfg.hflip)

    works: dict[str, Callable[[int], object]] = {
        "read": lambda index: (table.root / table.paths[index]).read_bytes(),
        "decode": images.reader,
        "transform": transform,
    }
    size, positions = job.cfg.data.batch_size, cycle(range(len(table)))
    found = {name: _get(job, work, images, plan) for name, work in works.items()}
    batch = measure(job.accelerator, lambda: images.__getitems__([(0, next(positions)) for _ in range(size)]), plan)
    return {**found, "batch": batch.of_images(size)}


def _get(job: Job, work: Callable[[int], object], images: TrainImages, plan: Plan) -> dict[str, Any]:
    """A batch of single images, the next of the table each time."""
    size, positions = job.cfg.data.batch_size, cycle(range(len(images.table)))
    return measure(job.accelerator, lambda: [work(next(positions)) for _ in range(size)], plan).of_images(size)


def fastest(found: dict[str, Any]) -> dict[str, Any]:
    """Of what `loading` gives, the stages from where training takes its images."""
    names = [name for name in ("from_device", "from_kept", "from_files") if name in found]
    stages: dict[str, Any] = found[names[0]]
    return stages


def _loops(job: Job, images: Samples, plan: Plan) -> dict[str, Any]:
    """The loop's own loader with its processes, to the host and to the input on the device."""
    size, device = job.cfg.data.batch_size, job.accelerator.device
    loader = TrainLoader(images, job.train_loader.batches, job.workers, pin_memory=device.type == "cuda")
    arriving = _endless(loader)
    return {
        "loader": measure(job.accelerator, lambda: next(arriving), plan).of_images(size),
        "input": measure(job.accelerator, lambda: job.to_input(next(arriving).to(device)), plan).of_images(size),
    }


def _endless(loader: TrainLoader) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    epoch = 0
    while True:
        for batches in loader.epoch(epoch):
            yield from batches
        epoch += 1
