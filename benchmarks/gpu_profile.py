"""Twenty training steps under torch.profiler: the longest kernels, launches per step, how long the GPU has no work.

    python benchmarks/gpu_profile.py --json profile.json --trace traces

The batches come from pinned memory, as in training, so their copies are in the picture. Every case of CASES is a row;
the file is written after every row, the traces are for chrome://tracing or Perfetto.
"""

import argparse
import gzip
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_steps import learner_of, random_batch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from resnet_dist.training.loop import train_step

CASES = {
    "resnet18 bf16 256": "--model resnet18 --batch-size 256",
    "resnet18 bf16 32": "--model resnet18 --batch-size 32",
    "resnet18 bf16 256 ema, adamw": "--model resnet18 --batch-size 256 --ema --opt adamw",
    "resnet18 fp16 256": "--model resnet18 --batch-size 256 --mixed-precision fp16",
    "resnet50 bf16 256": "--model resnet50 --batch-size 256",
}
STEPS, WARMUP, TOP = 20, 12, 20
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")


def main() -> None:
    """Profile every case, print its summary, write all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--trace", type=Path, help="folder for a compressed trace of three steps of every case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--options", default="", help="further options of train, for all cases")
    options = parser.parse_args()
    found = {}
    for name in options.cases:
        found[name] = profiled(CASES[name].split() + options.options.split(), name, options.trace)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
        print(name, {key: value for key, value in found[name].items() if key != "kernels"})
        for kernel in found[name]["kernels"]:
            often = f"{kernel['per_step']:6.1f} x {kernel['microseconds']:8.1f} us"
            print(f"    {kernel['share']:6.1%} {often}  {kernel['name']}")
        print(flush=True)


def profiled(words: list[str], name: str, traces: Path | None) -> dict[str, Any]:
    """One case: its steps timed without the profiler, then recorded by it."""
    with learner_of(["--mixed-precision", "auto", "--compile", "off", *words]) as (job, learner):
        batch = random_batch(job)
        batch = batch.pin_memory() if job.accelerator.device.type == "cuda" else batch

        def steps(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                train_step(job, learner, [batch])
            if job.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - started) / count

        steps(WARMUP)
        plain = steps(STEPS)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            under = steps(STEPS)
        if traces is not None:
            write_trace(traces / f"{name.replace(' ', '-').replace(',', '')}.json", lambda: steps(3))
    return {"step_seconds": plain, "step_seconds_profiled": under} | summary(recorded.events() or [], plain)


def summary(events: Sequence[Any], step_seconds: float) -> dict[str, Any]:
    """Launches per step, the GPU's idle share of a step without the profiler, copies, and the longest kernels."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    busy = covered([(event.time_range.start, event.time_range.end) for event in on_gpu]) / STEPS / 1e6
    seconds: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in on_gpu:
        seconds[event.name] += event.time_range.elapsed_us()
        times[event.name] += 1
    total = sum(seconds.values()) or 1
    launches = sum(event.name.startswith(LAUNCHES) for event in events if event.device_type == DeviceType.CPU)
    waits = Counter(event.name for event in events if "Synchronize" in event.name)
    kernels = [
        {"name": name[:140], "share": us / total, "per_step": times[name] / STEPS, "microseconds": us / times[name]}
        for name, us in seconds.most_common(TOP)
    ]
    return {
        "launches_per_step": launches / STEPS,
        "gpu_busy_seconds_per_step": busy,
        "gpu_idle_share": max(0.0, 1 - busy / step_seconds),
        "copy_share": sum(us for name, us in seconds.items() if "Memcpy" in name) / total,
        "synchronizations": dict(waits),  # of all steps; the last wait is the measurement's own
        "kernels": kernels,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of time spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def write_trace(file: Path, action: Any) -> None:
    """What the action does, as a compressed trace."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        action()
    recorded.export_chrome_trace(str(file))
    with file.open("rb") as plain, gzip.open(f"{file}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    file.unlink()


if __name__ == "__main__":
    main()
