"""What images cost in memory before one is looked at, and that looking at them leaves nothing behind."""

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest

from export.predict import Preprocessing
from resnet_dist.config.schema import AugmentConfig, DataConfig
from resnet_dist.data.index import ImageTable, PathTable, read_index
from resnet_dist.data.loader import Share, TrainBatches, TrainImages, TrainLoader
from tests.conftest import write_image

SPEC = Preprocessing(img_size=16, resize=18)
SAMPLES = 200_000


def endless(table: ImageTable, workers: int) -> itertools.chain[object]:
    images = TrainImages(table, SPEC, AugmentConfig(), seed=0)
    loader = TrainLoader(images, TrainBatches(len(table), 0, Share(8), True), workers, pin_memory=False)
    return itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())


def taken() -> int:
    """Bytes that Python, numpy and what they hold have now."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    """Five more, of as many images, grow by less than one image."""
    for number in range(16):
        write_image(tmp_path / f"{number}.png", number, size=(200, 200))
    table = ImageTable(tmp_path, PathTable([f"{number}.png" for number in range(16)]), np.zeros(16, np.int64))
    batches = endless(table, 0)
    tracemalloc.start()
    try:
        for _ in range(4):
            next(batches)
        before = taken()
        for _ in range(10):
            next(batches)
        assert taken() - before < 200 * 200 * 3 / 4
    finally:
        tracemalloc.stop()


@pytest.mark.matrix
def test_an_index_takes_little_per_sample(tmp_path: Path) -> None:
    """Of 200,000 paths of 32 bytes: under 64 bytes each when it is read, under 700 while it is."""
    manifest = tmp_path / "manifest.csv"
    with manifest.open("w") as stream:
        stream.write("path,label,split\n")
        for number in range(SAMPLES):
            split = "val" if number % 50 == 0 else "train"
            stream.write(f"folder_{number % 997:07d}/image_{number:06d}.png,class_{number % 97},{split}\n")
    tracemalloc.start()
    try:
        before = taken()
        index = read_index(DataConfig(data=str(manifest)))
        peak = tracemalloc.get_traced_memory()[1]
        assert len(index.train) + len(index.val) == SAMPLES
        assert (taken() - before) / SAMPLES < 64
        assert (peak - before) / SAMPLES < 700
    finally:
        tracemalloc.stop()


def grown(root: Path) -> int:
    """Bytes of their own that two loader processes gain over 400 batches, after 50."""
    paths = PathTable([f"{number // 1000:03d}/{number % 1000:03d}.png" for number in range(SAMPLES)])
    batches = endless(ImageTable(root, paths, np.zeros(SAMPLES, np.int64)), workers=2)

    def own() -> int:
        processes = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
        assert len(processes) == 2
        return sum(process.memory_full_info().uss for process in processes)

    for _ in range(50):
        next(batches)
    first = own()
    for _ in range(400):
        next(batches)
    return own() - first


@pytest.mark.matrix
def test_loader_processes_share_the_index(tmp_path: Path) -> None:
    """Memory of their own does not grow as they read samples from everywhere in a table of 200,000.

    In a fresh process: the memory of one that ran other tests is shared too, and is copied as it is touched.
    """
    real = tmp_path / "real"
    write_image(real / "000.png", 0)
    for number in range(1, 1000):
        os.link(real / "000.png", real / f"{number:03d}.png")
    for number in range(SAMPLES // 1000):
        (tmp_path / f"{number:03d}").symlink_to("real")
    code = "import sys, pathlib, tests.data.test_memory as t; print(t.grown(pathlib.Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 << 20
