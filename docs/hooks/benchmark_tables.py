"""Tables from the JSON files in benchmarks/results, with the machine that each was measured on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Rows = list[Sequence[str]]  # the first is the header


def benchmark_tables(folder: Path) -> str:
    """A section for every file: what it is, the machine, the command, and a table."""
    order = list(SECTIONS)
    files = sorted(
        folder.glob("*.json"), key=lambda f: (order.index(f.name) if f.name in order else len(order), f.name)
    )
    return "\n".join(part for file in files for part in section(file))


def section(file: Path) -> Iterator[str]:
    """The Markdown of one file. A file without a table of its own is only named."""
    values = json.loads(file.read_text())
    title, command, table = SECTIONS.get(file.name, (file.stem, "", None))
    yield f"## {title}\n"
    if command:
        yield f"`{command}`, `benchmarks/results/{file.name}`. {machine_of(values)}\n"
    else:
        yield f"`benchmarks/results/{file.name}`. {machine_of(values)}\n"
    if table is not None:
        header, *rows = table(values)
        yield "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)]) + "\n"


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def machine_of(values: Mapping[str, Any]) -> str:
    """Hardware and versions as far as the file has them."""
    machine = values.get("machine") or values.get("hardware") or {}
    parts = [*machine.get("gpus", []), machine.get("cpu"), values.get("processor")]
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    versions = machine.get("versions") or values.get("versions") or {}
    names = ("torch", "torchvision", "timm", "accelerate", "onnxruntime")
    parts += [f"{name} {versions[name]}" for name in names if name in versions]
    said = ", ".join(str(part) for part in parts if part)
    return f"Machine: {said}." if said else "The file does not say on which machine it was measured."


def spread(numbers: Sequence[float], digits: int) -> str:
    """The median, and the lowest and highest in brackets if there are several."""
    middle = f"{median(numbers):,.{digits}f}"
    if len(numbers) == 1:
        return middle
    return f"{middle} ({min(numbers):,.{digits}f} to {max(numbers):,.{digits}f})"


def peers(job: str) -> Callable[[Mapping[str, Any]], Rows]:
    """The table of a job of peers/compare.py."""

    def table(values: Mapping[str, Any]) -> Rows:
        rows: Rows = [("program", "rounds", "images/s", "wall-clock, s", "peak memory, MiB", "top-1")]
        for name, rounds in values["jobs"][job].items():
            scores = [f"{one['top1']:.3f}" for one in rounds if one["top1"] is not None]
            rows.append(
                (
                    name,
                    str(len(rounds)),
                    spread([one["images_per_second"] for one in rounds], 1),
                    spread([one["wall_seconds"] for one in rounds], 1),
                    spread([one["peak_memory_mib"] for one in rounds], 0),
                    ", ".join(scores) or "not measured",
                )
            )
        return rows

    return table


def steps(values: Mapping[str, Any]) -> Rows:
    """Training steps on a GPU."""
    rows: Rows = [("network", "precision", "batch", "images/s", "share of the roofline", "GPU memory, MiB")]
    for one in values["rows"]:
        speed, share = f"{one['images_per_second']:,.0f}", f"{one['share_of_roofline']:.0%}"
        rows.append((one["model"], one["precision"], str(one["batch_size"]), speed, share, f"{one['gpu_mib']:,}"))
    return rows


def profile(values: Mapping[str, Any]) -> Rows:
    """Launches and idle time of a step on a GPU."""
    rows: Rows = [("step", "ms", "launches", "GPU idle", "copies")]
    for name, one in values.items():
        shares = (f"{one['gpu_idle_share']:.0%}", f"{one['copy_share']:.0%}")
        rows.append((name, f"{1000 * one['step_seconds']:.1f}", f"{one['launches_per_step']:.0f}", *shares))
    return rows


def bench(values: Mapping[str, Any]) -> Rows:
    """The regimes of `resnet-dist bench`."""
    rows: Rows = [("what is trained", "step, images/s", "later epochs, images/s", "share of the roofline", "MiB")]
    for name, one in values["regimes"].items():
        step, later = one["compute"]["step"]["images_per_second"], one["training"]["later_epochs"]["images_per_second"]
        share, memory = one["limits"]["share_of_roofline"], one["peak_memory"]["host_mib"]
        rows.append((name, f"{step:.1f}", f"{later:.1f}", f"{share:.0%}", f"{memory:,}"))
    return rows


def check(values: Mapping[str, Any]) -> Rows:
    """How fast `check` looks at images."""
    rows: Rows = [("data", "images", "headers, images/s of one core", "whole images, images/s of one core")]
    for name, one in values["results"].items():
        speeds = [one[f"{what}_one_core_images_per_second"] for what in ("headers", "full")]
        rows.append((name, f"{one['images']:,}", *(f"{speed:,}" for speed in speeds)))
    return rows


def serving(values: Mapping[str, Any]) -> Rows:
    """The server and the plain loops, by number of clients."""
    rows: Rows = [("clients", "server", "requests/s", "p50, ms", "p99, ms", "CPU ms per answer")]
    for clients, servers in values["results"]["servers"].items():
        for name, one in servers.items():
            rows.append((clients, name, *(f"{one[key]:,}" for key in ("per_second", "p50_ms", "p99_ms", "cpu_ms"))))
    return rows


def exported(values: Mapping[str, Any]) -> Rows:
    """Seconds of torch and of the exported files."""
    rows: Rows = [("network", "measured", "program", "median (lowest to highest)")]
    for network, measured in values["networks"].items():
        for what, programs in measured.items():
            for program, numbers in programs.items():
                rows.append((network, what, program, spread(numbers, 3 if what.endswith("s") else 0)))
    return rows


def gate(values: Mapping[str, Any]) -> Rows:
    """What the gate of `export` measured."""
    rows: Rows = [("network", "file", "images", "largest difference of logits", "same top-1", "passed")]
    for network, case in values["cases"].items():
        for name, one in case["exports"]["smaller"]["report"].items():
            if isinstance(one, dict) and "max_logit_difference" in one:
                same = one.get("agreement", one.get("top1_agreement"))
                passed = "no" if one["problems"] else "yes"
                row = (network, name, str(one["images"]), f"{one['max_logit_difference']:.1e}", f"{same:.3f}", passed)
                rows.append(row)
    return rows


def agreement(values: Mapping[str, Any]) -> Rows:
    """How often int8 agrees with float32."""
    rows: Rows = [("network", "bits of the weights", "products", "images", "same top-1", "95 % interval")]
    for network, cases in values["networks"].items():
        for one in cases:
            same = "not measured" if one.get("agreement") is None else f"{one['agreement']:.3f}"
            interval = " to ".join(f"{end:.3f}" for end in one.get("interval") or ())
            rows.append((network, str(one["weight_bits"]), one["run"], str(one["images"]), same, interval))
    return rows


def loading(values: Mapping[str, Any]) -> Rows:
    """Loading images on one core."""
    rows: Rows = [("data", "loader", "images/s per core, median (lowest to highest)")]
    for data, one in values["data"].items():
        rows += [(data, name, spread(numbers, 0)) for name, numbers in one["images_per_second"].items()]
    return rows


def pipeline(values: Mapping[str, Any]) -> Rows:
    """Seconds of predict and of its parts, and their ratios."""
    rows: Rows = [("measured", "median (lowest to highest)")]
    for kind, steps in values["seconds per 1,000 images"].items():
        rows += [(f"{kind} seconds per 1,000 images: {name}", f"{seconds:g}") for name, seconds in steps.items()]
    for name in (name for name in values if " / " in name):
        middle, low, high = values[name]
        rows.append((name, f"{middle:g} ({low:g} to {high:g})"))
    return rows


def resident(values: Mapping[str, Any]) -> Rows:
    """Memory after so many images."""
    return [("images", "MiB"), *((f"{int(n):,}", str(mib)) for n, mib in values["resident MiB after images"].items())]


def facts(values: Mapping[str, Any]) -> Rows:
    """Names and values of a flat file."""
    rows: Rows = [("measured", "value")]
    for name, value in values.items():
        shown = ", ".join(f"{item:,}" for item in value) if isinstance(value, list) else f"{value:,}"
        rows.append((name, shown))
    return rows


PEERS = "python benchmarks/peers/compare.py --data hymenoptera --weights resnet18.safetensors --peers peers/bin/python"
SECTIONS: Mapping[str, tuple[str, str, Callable[[Mapping[str, Any]], Rows] | None]] = {
    "peers-full.json": ("Full fine-tuning beside other programs", f"{PEERS} --jobs full", peers("full")),
    "peers-steady.json": ("... over three epochs", f"{PEERS} --jobs full --steps 20", peers("full")),
    "peers-head.json": ("Ten epochs of a new head beside other programs", f"{PEERS} --jobs head", peers("head")),
    "gpu-steps.json": ("Training steps on one GPU", "bash benchmarks/gpu_run.sh steps", steps),
    "gpu-ddp.json": ("... in a DDP group of one", "bash benchmarks/gpu_run.sh ddp", steps),
    "gpu-profile.json": ("Where a step on a GPU goes", "bash benchmarks/gpu_run.sh profile", profile),
    "bench-ram.json": (
        "bench: full fine-tuning from decoded images",
        "resnet-dist bench DATA --regimes full --cache ram",
        bench,
    ),
    "bench-kept-features.json": (
        "bench: the last stage and the head from cached features",
        "resnet-dist bench DATA --aug none --regimes full,layer4+head",
        bench,
    ),
    "check.json": ("How fast check is", "python benchmarks/check.py", check),
    "serve_load.json": ("The server under load", "python benchmarks/serve_load.py MODEL IMAGES", serving),
    "export_speed.json": ("Exported files: speed", "python benchmarks/export_speed.py --data hymenoptera", exported),
    "export_memory.json": (
        "Exported files: speed and memory, with other work on the machine",
        "python benchmarks/export_speed.py --data hymenoptera",
        exported,
    ),
    "export_gate.json": (
        "Exported files: the gate (an earlier version, which did not test agreement)",
        "python benchmarks/export_gate.py --data hymenoptera --weights resnet18.safetensors",
        gate,
    ),
    "export_agreement.json": (
        "int8 beside float32",
        "python benchmarks/export_agreement.py --data hymenoptera --weights resnet18.safetensors --photos cats_dogs",
        agreement,
    ),
    "predict_pipeline.json": (
        "predict beside decoding and inference",
        "python benchmarks/predict_pipeline.py MODEL hymenoptera/val --rounds 11 --limit 48",
        pipeline,
    ),
    "predict_memory.json": (
        "Memory of predict",
        "python benchmarks/predict_pipeline.py MODEL hymenoptera/val --memory 10000",
        resident,
    ),
    "loading.json": ("Loading images", "python benchmarks/loading.py hymenoptera/train cats_dogs", loading),
    "million.json": ("A million images", "python benchmarks/million.py", facts),
}
