"""Time steps in windows: the median and spread of several windows. Only the end of a window waits for the device."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from resnet_dist.runtime.accelerate import on_main

WINDOW_SECONDS = 0.5  # length of a window if its number of steps is not given
MOST_STEPS = 1000


@dataclass(frozen=True)
class Repeats:
    """How long to measure: windows, steps in a window (None: half a second of steps), warmup steps."""

    windows: int
    steps: int | None
    warmup: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: the median, the 10th and the 90th percentile over the windows.

    `host_share` is the share of that time in which the host launched the work of a GPU: near 1, the host is the limit.
    None on a CPU.
    """

    seconds: float
    p10: float
    p90: float
    windows: int
    steps: int
    host_share: float | None = None

    def of_images(self, images: int) -> dict[str, Any]:
        """As JSON, with the images per second if a step has this many images."""
        return {**vars(self), "images": images, "images_per_second": images / self.seconds}

    def rates(self, amount: float) -> dict[str, float]:
        """As JSON, the `amount` of work of a step per second: median, 10th and 90th percentile."""
        return {"median": amount / self.seconds, "p10": amount / self.p90, "p90": amount / self.p10}


def measure(accelerator: Accelerator, step: Callable[[], object], repeats: Repeats) -> Timing:
    """Time `step`. Every process must call this and takes equally many steps; each returns its own times."""
    for _ in range(max(1, repeats.warmup)):
        step()
    wait_for(accelerator.device)
    steps = repeats.steps
    if steps is None:
        once = _window(accelerator.device, step, 1)[0]
        steps = on_main(accelerator, lambda: max(1, min(MOST_STEPS, math.ceil(WINDOW_SECONDS / once))))
    windows = [_window(accelerator.device, step, steps) for _ in range(repeats.windows)]
    return summary([seconds for seconds, _ in windows], steps, [host for _, host in windows])


def summary(seconds: list[float], steps: int, host_seconds: list[float] | None = None) -> Timing:
    """The timing from the seconds of windows of `steps` steps each."""
    p10, median, p90 = (float(value) / steps for value in np.percentile(seconds, [10, 50, 90]))
    host = None if not host_seconds or None in host_seconds else float(np.median(host_seconds)) / (median * steps)
    return Timing(median, p10, p90, len(seconds), steps, host)


def _window(device: torch.device, step: Callable[[], object], steps: int) -> tuple[float, Any]:
    """Seconds of `steps` steps and, on a GPU, seconds until the host had launched them."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(device)
        return time.perf_counter() - start, None
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    first.record()
    for _ in range(steps):
        step()
    last.record()
    host = time.perf_counter() - start
    last.synchronize()
    return first.elapsed_time(last) / 1000, host


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
