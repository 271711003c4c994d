"""Memory and start-up of an index of a million images with four loader processes.

    python benchmarks/million.py --json million.json

The images are tiny: a thousand folders of a thousand names each, those of a folder being hard links to one file (which
`read_index` alone takes for many; `train` would not). Measured are the time to
read the manifest, the time until the first batch is there, and the memory of the process and its loader processes as
the sum of their proportional set sizes (PSS: what is shared counts once), before the index, with it, and after each of
some stretches of batches, which shows whether it grows; and the same less what importing torch takes.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from export.predict import Preprocessing
from resnet_dist.config.schema import AugmentConfig, DataConfig
from resnet_dist.data.index import ImageIndex, read_index
from resnet_dist.data.loader import Share, TrainBatches, TrainImages, TrainLoader

SPEC = Preprocessing(img_size=32, resize=36)


def main() -> None:
    """Measure and print."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more processes than cores, on purpose
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="million-") as folder:
        manifest = make_manifest(Path(folder), options.samples)
        measured = measure(manifest, options.workers)
    for name, value in measured.items():
        print(f"{name}: {value}")
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")


def make_manifest(folder: Path, samples: int) -> Path:
    """A manifest of so many existing paths, a hundred classes, one image in fifty for validation."""
    image, manifest = Image.fromarray(np.zeros((8, 8, 3), np.uint8)), folder / "manifest.csv"
    with manifest.open("w") as stream:
        stream.write("path,label,split\n")
        for number in range(samples):
            which, file = divmod(number, 1000)
            place, first = folder / f"folder_{which:04d}", folder / f"folder_{which:04d}" / "image_0000.png"
            if not file:
                place.mkdir()
                image.save(first)
            else:
                os.link(first, place / f"image_{file:04d}.png")
            split = "val" if number % 50 == 0 else "train"
            stream.write(f"{place.name}/image_{file:04d}.png,class_{which % 100:03d},{split}\n")
    return manifest


def measure(manifest: Path, workers: int) -> dict[str, Any]:
    """Seconds and mebibytes."""
    before, peak_before = memory(), peak_memory()
    started = time.perf_counter()
    index = read_index(DataConfig(data=str(manifest)))
    reading, peak = time.perf_counter() - started, round(peak_memory() - peak_before, 1)
    with_index = memory()
    batches = epochs(index, workers)
    next(batches)
    first_batch = time.perf_counter() - started
    stretches = []
    for _ in range(4):
        for _ in range(100):
            next(batches)
        stretches.append(memory())
    return {
        "samples": len(index.train) + len(index.val),
        "workers": workers,
        "seconds to read the manifest": round(reading, 2),
        "seconds to the first batch": round(first_batch, 2),
        "MiB before": before,
        "MiB with the index": with_index,
        "MiB that reading takes at most, with the index": peak,
        "MiB with the loader processes, after 100, 200, 300, 400 batches": stretches,
        "MiB of the index and the loader processes": round(max(stretches) - before, 1),
    }


def epochs(index: ImageIndex, workers: int) -> Any:
    """Batches without end."""
    images = TrainImages(index.train, SPEC, AugmentConfig(), seed=0)
    loader = TrainLoader(images, TrainBatches(len(index.train), 0, Share(32), True), workers, pin_memory=False)
    return itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())


def memory() -> float:
    """MiB of this process and those it started, what they share counted once."""
    me = psutil.Process()
    processes = [me, *me.children(recursive=True)]
    return round(sum(process.memory_full_info().pss for process in processes) / (1 << 20), 1)


def peak_memory() -> float:
    """MiB that this process has taken at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024, 1)


if __name__ == "__main__":
    main()
