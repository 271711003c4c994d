"""Loading alone, stage by stage: from files or caches to the network's input on the device."""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

from resnet_dist.bench.timing import Repeats, measure
from resnet_dist.data.device_augment import DrawnImages
from resnet_dist.data.loader import DeviceImages, Samples, TrainImages, TrainLoader
from resnet_dist.data.transforms import Batch, sample_key, training_pixels
from resnet_dist.training.job import Job


def loading(job: Job, repeats: Repeats) -> dict[str, Any]:
    """Images per second of each stage including the stages before it, from files and from the job's cache, if any.

    "from_kept" is the cache in memory or on disk, "from_device" the one on the device. The files have been read
    before, so they come from the operating system's cache if they fit into memory.
    """
    images = job.train_images
    plain = TrainImages(images.table, images.spec, images.cfg, images.seed)
    measured = {"from_files": {**_stages(job, plain, repeats), **_loops(job, plain, repeats)}}
    if isinstance(job.train_loader.samples, (DeviceImages, DrawnImages)):
        measured["from_device"] = _loops(job, job.train_loader.samples, repeats)
    elif images.read is not images.reader:
        for _ in job.train_loader.epoch(0):  # fills the cache
            pass
        measured["from_kept"] = {"get": _get(job, images.read, images, repeats), **_loops(job, images, repeats)}
    return measured


def _stages(job: Job, images: TrainImages, repeats: Repeats) -> dict[str, Any]:
    """The stages in one process: read, decode, transform (geometry and colour), batch."""
    table = images.table

    def transform(index: int) -> object:
        key = sample_key(images.seed, 0, index)
        return training_pixels(images.reader(index), key, images.transform, images.cfg.hflip)

    works: dict[str, Callable[[int], object]] = {
        "read": lambda index: table.path(index).read_bytes(),
        "decode": images.reader,
        "transform": transform,
    }
    size, positions = job.plan.share.batch_size, cycle(range(len(table)))
    stages = {name: _get(job, work, images, repeats) for name, work in works.items()}
    batch = measure(job.accelerator, lambda: images.__getitems__([(0, next(positions)) for _ in range(size)]), repeats)
    return {**stages, "batch": batch.of_images(size)}


def _get(job: Job, work: Callable[[int], object], images: TrainImages, repeats: Repeats) -> dict[str, Any]:
    """Time `work` on a batch of single images, each the next of the table."""
    size, positions = job.plan.share.batch_size, cycle(range(len(images.table)))
    return measure(job.accelerator, lambda: [work(next(positions)) for _ in range(size)], repeats).of_images(size)


def fastest(measured: dict[str, Any]) -> dict[str, Any]:
    """From the result of `loading`, the stages of the source that training uses."""
    names = [name for name in ("from_device", "from_kept", "from_files") if name in measured]
    stages: dict[str, Any] = measured[names[0]]
    return stages


def _loops(job: Job, images: Samples, repeats: Repeats) -> dict[str, Any]:
    """The loop's own loader with its processes: to the host, and to the input on the device."""
    size, device = job.plan.share.batch_size, job.accelerator.device
    loader = TrainLoader(images, job.train_loader.batches, job.plan.workers, pin_memory=device.type == "cuda")
    arriving = _endless(loader)
    return {
        "loader": measure(job.accelerator, lambda: next(arriving), repeats).of_images(size),
        "input": measure(job.accelerator, lambda: job.to_input(next(arriving).to(device)), repeats).of_images(size),
    }


def _endless(loader: TrainLoader) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    epoch = 0
    while True:
        for batches in loader.epoch(epoch, until=epoch + 100):
            yield from batches
        epoch += 1
