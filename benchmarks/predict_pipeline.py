"""How much `predict` adds to decoding and inference, and whether its memory grows with the number of images.

    python benchmarks/predict_pipeline.py runs/photos/export/model.onnx hymenoptera/val

CPU time is measured, because it changes less than wall time if other programs run. In each round, the same photographs
are decoded and resized alone, their pixels go through the network alone, a loop of a few lines does both at the same
time without any limit of memory, and `Predictor.predict` does both and writes the rows; the order of the four changes
from round to round. With `--memory N`, N images (the photographs again
and again) are predicted once, and the memory of the process is read at eight places.
"""

import argparse
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from export_gate import machine

from export.predict import WRITERS, Predictor, find_images

BATCH = 16


def main() -> None:
    """Measure, and print the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("photos")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=1000, help="photographs to use at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, metavar="N", help="predict N images and read the memory instead")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()
    predictor = Predictor(options.model, options.threads, "cpu")
    files = list(find_images([options.photos]))[: options.limit]
    conditions = {"machine": machine(), "threads": options.threads, "photos": len(files)}
    conditions |= {"network": predictor.metadata["architecture"], "precision": predictor.metadata["precision"]}
    measured = memory(predictor, files, options.memory) if options.memory else throughput(predictor, files, options)
    text = json.dumps(conditions | measured, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def throughput(predictor: Predictor, files: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """CPU and wall seconds per 1,000 images of each step, and what predict adds to the sum of the two parts."""
    pixels = np.stack(decode(predictor, files))
    steps: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(predictor, files),
        "inference": lambda: [predictor.logits(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)],
        "both, plain": lambda: plain(predictor, files),
        "predict": lambda: rows(predictor, files),
    }
    orders = itertools.cycle(itertools.permutations(steps))
    found: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in steps} for kind in ("cpu", "wall")}
    for number in range(options.rounds + 1):
        for name in next(orders):
            cpu, wall = seconds_of(steps[name])
            if number:  # the first round warms up
                found["cpu"][name].append(1000 * cpu / len(files))
                found["wall"][name].append(1000 * wall / len(files))
    sums = [sum(parts) for parts in zip(found["cpu"]["decode"], found["cpu"]["inference"], strict=True)]
    medians = {k: {name: round(statistics.median(v), 2) for name, v in steps.items()} for k, steps in found.items()}
    return {
        "rounds": options.rounds,
        "seconds per 1,000 images": medians,
        "cpu of predict / (decode + inference)": spread(found["cpu"]["predict"], sums),
        "cpu of predict / both, plain": spread(found["cpu"]["predict"], found["cpu"]["both, plain"]),
        "wall of predict / both, plain": spread(found["wall"]["predict"], found["wall"]["both, plain"]),
    }


def spread(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Median, lowest and highest of the ratios of the rounds."""
    ratios = [one / other for one, other in zip(values, others, strict=True)]
    return [round(number, 3) for number in (statistics.median(ratios), min(ratios), max(ratios))]


def decode(predictor: Predictor, files: Sequence[str]) -> list[np.ndarray]:
    """The pixels of all files, by as many threads as predict has."""
    with ThreadPoolExecutor(predictor.threads) as pool:
        return [pixels for _, pixels, _ in pool.map(predictor.load, files) if pixels is not None]


def plain(predictor: Predictor, files: Sequence[str]) -> list[np.ndarray]:
    """Decode everything in threads, and run a batch as soon as it is there."""
    with ThreadPoolExecutor(predictor.threads) as pool:
        loading = [pool.submit(predictor.load, file) for file in files]
        batches = (loading[i : i + BATCH] for i in range(0, len(loading), BATCH))
        return [predictor.logits(np.stack([future.result()[1] for future in batch])) for batch in batches]  # type: ignore[misc]


def rows(predictor: Predictor, files: Sequence[str]) -> str:
    """What predict writes."""
    stream = io.StringIO()
    for prediction in predictor.predict(files, batch_size=BATCH, top_k=min(5, len(predictor.classes))):
        WRITERS["csv"](stream, len(prediction.classes), prediction)
    return stream.getvalue()


def seconds_of(step: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of all threads, and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def memory(predictor: Predictor, files: Sequence[str], count: int) -> dict[str, Any]:
    """Resident memory in MiB after each eighth of the images."""
    many: Iterator[str] = itertools.islice(itertools.cycle(files), count)
    resident: dict[int, int] = {}
    for number, prediction in enumerate(predictor.predict(many), 1):
        assert not prediction.error, prediction
        if number % max(1, count // 8) == 0:
            resident[number] = resident_mib()
    return {"resident MiB after images": resident}


def resident_mib() -> int:
    """The resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10


if __name__ == "__main__":
    main()
