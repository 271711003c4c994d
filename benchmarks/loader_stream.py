"""How many loader processes short epochs keep busy: `python benchmarks/loader_stream.py`. Needs no images and no GPU.

Sleeping simulates decoding (2 ms an image), so that the numbers do not depend on the cores. For epochs of 2, 6, 16 and
64 batches of 64 images and 8 loader processes, it prints the images/s of ten epochs after the twelfth, if loading
restarts in each epoch and if one stream runs over all epochs, and the share of the speed of 8 processes.
"""

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.data.loader import Share, TrainBatches, TrainLoader, close_loaders
from resnet_dist.data.transforms import Batch

EPOCHS, FIRST, BATCH, WORKERS, SECONDS = 22, 12, 64, 8, 0.002
EMPTY = torch.empty(0)


class Sleeping:
    """A source of batches that takes its time and holds nothing."""

    def __init__(self, samples: int) -> None:
        self.table = ImageTable(Path(), PathTable([str(n) for n in range(samples)]), np.zeros(samples, np.int64))

    def __getitems__(self, keys: Any) -> Batch:
        time.sleep(SECONDS * len(keys))
        return Batch(EMPTY, EMPTY, EMPTY, EMPTY)


def images_per_second(batches: int, stream: bool) -> float:
    """Once the loader processes have started and what they load ahead has been used."""
    samples = Sleeping(batches * BATCH)
    loader = TrainLoader(samples, TrainBatches(batches * BATCH, 0, Share(BATCH), False), WORKERS, pin_memory=False)
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        if epoch == FIRST:
            start = time.perf_counter()
        for _ in loader.epoch(epoch, until=2 * EPOCHS if stream else None):
            pass
    seconds = time.perf_counter() - start
    close_loaders()
    return batches * BATCH * (EPOCHS - FIRST) / seconds


def main() -> None:
    """Print a table."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores: they sleep
    most = WORKERS / SECONDS
    print("batches an epoch   each epoch restarts  one stream")
    for batches in (2, 6, 16, 64):
        rates = [images_per_second(batches, stream) for stream in (False, True)]
        print(f"{batches:16}" + "".join(f"{rate:10.0f} ({100 * rate / most:3.0f} %)" for rate in rates))


if __name__ == "__main__":
    main()
