"""`resnet-dist bench scaling`: run `bench` with several numbers of processes, and compare their speeds."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from resnet_dist.bench.frame import TEMPORARY, Result, publish
from resnet_dist.bench.options import ScalingConfig
from resnet_dist.bench.scaling_estimate import GPUS, Cluster, Estimate, Link, Step, estimate
from resnet_dist.config.layers import options_of
from resnet_dist.runtime.subprocesses import run_program
from resnet_dist.runtime.wording import counted

TIMEOUT = 3600  # seconds
FULL_ONLY = ("--regimes", "full", "--no-predict")
OWN = ("world_sizes", "json", "estimate", "link_gbits", "link_latency")  # options that `bench` does not have


def run_scaling(cfg: ScalingConfig) -> None:
    """Measure, print the table and write the JSON file. Raises ResnetDistError."""
    on_gpu = torch.cuda.is_available()
    # One process of a launcher differs from one without only if it is wrapped in DDP, which happens on GPUs.
    worlds = [None, *(size for size in cfg.world_sizes if size > 1 or on_gpu)]
    reports = []
    for processes in worlds:
        launched = ", launched" if processes else ""
        print(f"{counted(processes or 1, 'process')}{launched} ...", flush=True)
        reports.append(report_of(cfg, processes, on_gpu))
    rows = [row(report, reports[0]) for report in reports]
    result = Result({"worlds": rows, "reports": reports}, list(lines(rows)))
    publish(with_estimate(result, cfg) if cfg.estimate else result, cfg.json)


def report_of(cfg: ScalingConfig, processes: int | None, on_gpu: bool) -> dict[str, Any]:
    """What `bench` reports with this number of processes; None: one without a launcher. Raises MachineError."""
    variables = {} if on_gpu else {"ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        file = Path(folder) / "bench.json"
        arguments = ["bench", *arguments_of(cfg), *FULL_ONLY, "--json", str(file)]
        run_program("bench", arguments, processes, variables, TIMEOUT)
        report: dict[str, Any] = json.loads(file.read_text())
        return report


def arguments_of(cfg: ScalingConfig) -> list[str]:
    """The options of `bench` that say what this config says: those that differ from their defaults."""
    words = []
    for option in options_of(ScalingConfig):
        value = getattr(getattr(cfg, option.section) if option.section else cfg, option.name)
        if value == option.default or option.name in OWN:
            continue
        if isinstance(value, bool):
            words.append(option.flag if value else option.flag.replace("--", "--no-", 1))
        else:
            words.append(f"{option.flag}={_text(value)}")
    return words


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def row(report: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """The speeds of all processes together, and their efficiency relative to `alone`, the report of one process.

    The efficiency is the speed divided by that of perfect scaling: on GPUs the speed of one process times the number
    of processes; on a CPU, whose cores the processes share, the speed of one process, which has all cores.
    """
    processes = report["machine"]["processes"]
    units = processes if report["machine"]["device"] == "cuda" else 1
    step, whole = _rates(report)
    step_alone, whole_alone = _rates(alone)
    found = {"processes": processes, "threads": report["machine"]["threads"]}
    found |= {"step_images_per_second": step, "training_images_per_second": whole}
    found |= {"step_efficiency": step / (units * step_alone), "training_efficiency": whole / (units * whole_alone)}
    communication = report["regimes"]["full"]["compute"].get("communication")
    if communication is not None:
        own = communication["step_alone"]["seconds"] / report["regimes"]["full"]["compute"]["step"]["seconds"]
        found |= {"exposed_communication": max(0.0, 1 - own), "all_reduce_bytes": communication["all_reduce_bytes"]}
    return found


def _rates(report: dict[str, Any]) -> tuple[float, float]:
    """Images per second of all processes together: of steps alone, and of whole epochs."""
    regime = report["regimes"]["full"]
    step = report["machine"]["processes"] * regime["compute"]["step"]["images_per_second"]
    return step, regime["training"]["later_epochs"]["images_per_second"]


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table as text."""
    head = f"{'processes':>9}{'threads':>9}{'step img/s':>12}{'efficiency':>12}{'epoch img/s':>13}{'efficiency':>12}"
    yield f"{head}  gradient all-reduce"
    for entry in rows:
        sums = ""
        if "all_reduce_bytes" in entry:
            speed = entry["all_reduce_bytes"]["median"] / 1e9
            sums = f"{entry['exposed_communication']:.0%} of a step, {speed:.2g} GB/s"
        yield (
            f"{entry['processes']:>9}{entry['threads']:>9}{entry['step_images_per_second']:>12,.1f}"
            f"{entry['step_efficiency']:>12.0%}{entry['training_images_per_second']:>13,.1f}"
            f"{entry['training_efficiency']:>12.0%}  {sums}"
        ).rstrip()


def with_estimate(result: Result, cfg: ScalingConfig) -> Result:
    """The result with an estimate for larger clusters, from the report of one process without a launcher."""
    compute = result.values["reports"][0]["regimes"]["full"]["compute"]
    seconds = compute["step"]["seconds"]
    backward = (compute["forward_backward"]["seconds"] - compute["forward"]["seconds"]) / seconds
    step = Step(seconds, compute["gradient_bytes"], backward=min(max(backward, 0.0), 1.0))
    cluster = Cluster(Link(cfg.link_gbits * 1e9 / 8, cfg.link_latency * 1e-6))
    found = [estimate(step, cluster, gpus) for gpus in GPUS]
    images = compute["step"]["images"]
    values = result.values | {
        "estimate": {"step": asdict(step), "cluster": asdict(cluster), "gpus": list(map(asdict, found))}
    }
    return Result(values, [*result.lines, *estimate_lines(step, cluster, found, images)])


def estimate_lines(step: Step, cluster: Cluster, found: Sequence[Estimate], images: int) -> Iterator[str]:
    """The estimate as text; `images` is the number of images in a step of one GPU."""
    between, within = cluster.between, cluster.within
    yield ""
    yield (
        f"Estimated, not measured: nodes of {cluster.gpus_per_node} GPUs, each as fast as the one process above "
        f"({1000 * step.seconds:.1f} ms per step, {step.gradient_bytes / 1e6:.1f} MB of gradients);"
    )
    yield (
        f"{within.bytes_per_second / 1e9:g} GB/s within a node, {between.bytes_per_second / 1e9:g} GB/s and "
        f"{1e6 * between.latency:g} us between nodes; ring all-reduce during the backward pass; step times vary by "
        f"{step.jitter:.0%}"
    )
    yield f"{'GPUs':>9}{'step img/s':>12}{'efficiency':>12}  gradient all-reduce"
    for one in found:
        yield (
            f"{one.gpus:>9}{one.gpus * images / one.seconds:>12,.0f}{one.efficiency:>12.0%}  "
            f"{1000 * one.all_reduce:.1f} ms, {1000 * one.exposed:.1f} ms of it after the backward pass"
        )
