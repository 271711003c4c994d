"""Images per second and core that loaders deliver, in turns on one core: ours, timm's, torchvision's, fastai's steps.

    python benchmarks/loading.py ../shared/data/hymenoptera/train ../shared/data/cats_dogs --json loading.json

The job is the same for all: batches of 32 of a folder of class folders, a random resized crop to 224 pixels, a flip,
float32, normalised. Every contestant works in this process, without loader processes, with one thread on one core, so
that a rate is one of a core. A round has all of them load the same number of images, one after the other (A B C A B
C ...); a ratio is the median over the rounds of that round's ratio to the best peer. `ours, kept` has its images in the
cache (`--cache ram`) from the round before; `ours, kept, no crop` is `--aug none`, which keeps them at 224 pixels.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from export.predict import Preprocessing, decode
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.cache import ImageCache, bytes_needed
from resnet_dist.data.decode import load_whole
from resnet_dist.data.index import ImageTable, PathTable, class_rows
from resnet_dist.data.loader import Share, TrainBatches, TrainImages, TrainLoader
from resnet_dist.data.transforms import ToInput, augment, training_pixels

BATCH, SIZE = 32, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = Preprocessing(img_size=SIZE, resize=256)
PEERS = ("timm", "torchvision", "fastai's steps")
Batches = Iterator[torch.Tensor]


def main() -> None:
    """Measure every folder, print a table, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256, help="images a contestant loads in a round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    packages = ("torch", "torchvision", "timm", "pillow", "numpy")
    results: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in packages},
        "rounds": options.rounds,
        "images": options.images,
        "data": {},
    }
    for folder in options.data:
        results["data"][str(folder)] = measured = measure(folder, options.rounds, options.images)
        print_table(folder, measured)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(folder: Path, rounds: int, images: int) -> dict[str, Any]:
    """Rates of all contestants in every round, ratios to the best peer, and where our time goes."""
    table = table_of(folder)
    contestants = {
        "ours": ours(table, AugmentConfig()),
        "ours, kept": ours(table, AugmentConfig(), kept=True),
        "ours, kept, no crop": ours(table, AugmentConfig(aug="none"), kept=True),
        "timm": of_timm(folder),
        "torchvision": of_torchvision(folder),
        "fastai's steps": of_fastai(folder),
    }
    for name, batches in contestants.items():  # the page cache and, where there is one, ours are filled
        rate(batches, len(table) + BATCH if "kept" in name else images)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, batches in contestants.items():
            rates[name].append(rate(batches, images))
    best = [max(rates[peer][number] for peer in PEERS) for number in range(rounds)]
    ratios = {
        name: [own / peer for own, peer in zip(values, best, strict=True)]
        for name, values in rates.items()
        if name.startswith("ours")
    }
    return {"samples": len(table), "images_per_second": rates, "to_best_peer": ratios, "stages_ms": stages(table)}


def rate(batches: Batches, images: int) -> float:
    """Images per second over at least so many images."""
    started, loaded = time.perf_counter(), 0
    while loaded < images:
        loaded += len(next(batches))
    return loaded / (time.perf_counter() - started)


def table_of(folder: Path) -> ImageTable:
    """The images of a folder of class folders, as training has them."""
    rows = class_rows(folder)
    classes = sorted({label for _, label in rows})
    targets = np.array([classes.index(label) for _, label in rows])
    return ImageTable(folder, PathTable([path for path, _ in rows]), targets)


def ours(table: ImageTable, cfg: AugmentConfig, kept: bool = False) -> Batches:
    """Our training batches as the network takes them."""
    images = TrainImages(table, SPEC, cfg, seed=0)
    if kept:
        file = Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('loading')}")
        images.read = ImageCache(images.reader, file, 2 * bytes_needed(images.reader))
    loader = TrainLoader(images, TrainBatches(len(table), 0, Share(BATCH), True), 0, pin_memory=False)
    to_input = ToInput(SPEC, torch.device("cpu"))
    for epoch in itertools.count():
        for (batch,) in loader.epoch(epoch):
            yield to_input(batch)


def of_timm(folder: Path) -> Batches:
    """timm's own dataset and loader; its prefetcher, which normalises on a GPU, needs one."""
    loader = timm.data.create_loader(
        timm.data.create_dataset("", str(folder)),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=False,
        color_jitter=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=0,
        persistent_workers=False,
        pin_memory=False,
    )
    while True:
        yield from (images for images, _ in loader)


def of_torchvision(folder: Path) -> Batches:
    """As torchvision's training reference does it by default: ImageFolder, Pillow, then tensors."""
    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    steps += [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
    loader = DataLoader(ImageFolder(str(folder), transforms.Compose(steps)), BATCH, shuffle=True, drop_last=True)
    while True:
        yield from (images for images, _ in loader)


def of_fastai(folder: Path) -> Batches:
    """fastai's steps: Pillow for crop and flip, uint8 tensors one by one, float and normalised a batch at a time."""
    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    loader = DataLoader(ImageFolder(str(folder), transforms.Compose(steps)), BATCH, shuffle=True, drop_last=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    while True:
        yield from (images.float().div_(255).sub_(mean).div_(std) for images, _ in loader)


def stages(table: ImageTable, count: int = 64) -> dict[str, float]:
    """Milliseconds per image of each part of our way, and of Pillow's decoding."""
    chosen = range(0, len(table), max(1, len(table) // count))
    cfg = AugmentConfig()
    transform = augment(cfg, SPEC)
    files = [table.root / table.paths[index] for index in chosen]
    decoded = [load_whole(table, index) for index in chosen]
    batch = torch.zeros(BATCH, SIZE, SIZE, 3, dtype=torch.uint8)

    def normalise(number: int) -> None:
        batch[number % BATCH].to(torch.float32).div_(255).sub_(torch.tensor(MEAN)).div_(torch.tensor(STD))

    parts: dict[str, Callable[[int], object]] = {
        "read": lambda number: files[number].read_bytes(),
        "read and decode": lambda number: load_whole(table, chosen[number]),
        "read and decode by Pillow": lambda number: np.asarray(decode(files[number])),
        "crop, resize": lambda number: training_pixels(decoded[number], number, transform, cfg.hflip),
        "normalise": normalise,
    }
    return {name: 1000 * statistics.median(timed(part, len(chosen)) for _ in range(3)) for name, part in parts.items()}


def timed(part: Callable[[int], object], count: int) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for number in range(count):
        part(number)
    return (time.perf_counter() - started) / count


def print_table(folder: Path, measured: dict[str, Any]) -> None:
    """Markdown."""
    with Image.open(next(file for file in folder.rglob("*.jpg")), formats=["JPEG"]) as image:
        print(f"\n{folder}: {measured['samples']} images, such as {image.width}x{image.height}\n")
    print("| loader | images/s and core | to the best peer |\n|---|---|---|")
    for name, rates in measured["images_per_second"].items():
        ratios = measured["to_best_peer"].get(name)
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        print(f"| {name} | {statistics.median(rates):,.0f} | {ratio} |")
    print("\nms per image:", ", ".join(f"{name} {value:.3f}" for name, value in measured["stages_ms"].items()))


if __name__ == "__main__":
    main()
