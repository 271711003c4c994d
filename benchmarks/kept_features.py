"""How fast samples come from kept features, on one core: `python benchmarks/kept_features.py`. Needs no images, no GPU.

It prints the samples per second of CPU time, for batches of 32, 64 and 256, of ten epochs of 100,000 samples: their
order, keys and targets alone, and together with reading 512 numbers of bf16 for each. Best of three rounds.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.data.loader import KnownSamples, Share, TrainBatches, TrainLoader
from resnet_dist.data.transforms import Batch
from resnet_dist.training.features import Features

SAMPLES, EPOCHS, ROUNDS, WIDTH = 100_000, 10, 3, 512


def samples_per_second(batch_size: int, read: Callable[[Batch], object]) -> float:
    """`read` is called with each batch."""
    table = ImageTable(Path(), PathTable([str(n) for n in range(SAMPLES)]), np.arange(SAMPLES) % 10)
    loader = TrainLoader(KnownSamples(table), TrainBatches(SAMPLES, 0, Share(batch_size), True), 0, pin_memory=False)
    start = time.process_time()
    for epoch in range(EPOCHS):
        for (batch,) in loader.epoch(epoch, until=EPOCHS):
            read(batch)
    return EPOCHS * SAMPLES / (time.process_time() - start)


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    values = torch.zeros(SAMPLES, WIDTH, dtype=torch.bfloat16)
    features = Features(nn.Identity(), [], values[:1], values)
    print("batch size  samples/s  with their features")
    for batch_size in (32, 64, 256):
        alone, read = (
            max(samples_per_second(batch_size, what) for _ in range(ROUNDS)) for what in (lambda batch: batch, features)
        )
        print(f"{batch_size:10}{alone:11,.0f}{read:21,.0f}")


if __name__ == "__main__":
    main()
