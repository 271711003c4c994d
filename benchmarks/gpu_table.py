"""What `gpu_run.sh` wrote into a folder, as tables for benchmarks/README.md: steps, profiles, whole training, peers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = ("steps", "float32", "ema", "ddp", "compile18", "compile50")


def main() -> None:
    """Print every table whose numbers are there."""
    folder = Path(sys.argv[1])
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json")) if file.stat().st_size}
    for text in [*steps(found), *profiles(found), *benches(found), *peers(found)]:
        print(text)


def steps(found: dict[str, Any]) -> Iterator[str]:
    """Of gpu_steps.py; with DDP, beside the same step without it."""
    files = {name: found[name] for name in STEPS if name in found}
    if not files:
        return
    first = next(iter(files.values()))
    if "roofs" in first:
        gemm = {name: f"{speed['median'] / 1e12:.0f}" for name, speed in first["roofs"]["gemm_flops"].items()}
        yield f"{first['machine']}; TFLOP/s {gemm}; copy {first['roofs']['copy_bytes']['median'] / 1e12:.2f} TB/s\n"
    yield "| step | network | precision | batch | images/s | ms | host share | of roofline | of products | GPU MiB |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    plain = {key_of(row): row for row in found.get("steps", {"rows": []})["rows"] if "seconds" in row}
    for name, file in files.items():
        for row in file["rows"]:
            yield step_row(name, row, plain.get(key_of(row)))
    yield ""


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows of different files have in common."""
    return row["model"], row["precision"], row["batch_size"]


def step_row(name: str, row: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """A line of the table."""
    start = f"| {name} | {row['model']} | {row['precision']} | {row['batch_size']} "
    if "seconds" not in row:
        return start + f"| {row['error']} | | | | | |"
    beside = f" ({plain['seconds'] / row['seconds']:.0%})" if plain and name != "steps" else ""
    host = "" if row["host_share"] is None else f"{row['host_share']:.2f}"
    shares = f"{row['share_of_roofline']:.0%} | {row['share_of_gemm']:.0%}"
    rate = f"{row['images_per_second']:,.0f}{beside}"
    return start + f"| {rate} | {1000 * row['seconds']:.2f} | {host} | {shares} | {row['gpu_mib']} |"


def profiles(found: dict[str, Any]) -> Iterator[str]:
    """Of gpu_profile.py."""
    if "profile" not in found:
        return
    yield "| profile | ms | launches | GPU idle | copies | longest kernels |"
    yield "|---|---|---|---|---|---|"
    for name, case in found["profile"].items():
        kernels = ", ".join(f"{kernel['name'][:40]} {kernel['share']:.0%}" for kernel in case["kernels"][:4])
        times = f"{1000 * case['step_seconds']:.2f} | {case['launches_per_step']:.0f} | {case['gpu_idle_share']:.0%}"
        yield f"| {name} | {times} | {case['copy_share']:.1%} | {kernels} |"
    yield ""


def benches(found: dict[str, Any]) -> Iterator[str]:
    """Of `resnet-dist bench`."""
    names = [name for name in found if name.startswith("bench-")]
    if not names:
        return
    yield "| bench | regime | step images/s | of roofline | first epoch | later epochs | waits | overlap | GPU MiB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in names:
        for regime, of in found[name]["regimes"].items():
            step, whole = of["compute"]["step"], of["training"]
            speeds = f"{step['images_per_second']:,.0f} | {of['limits']['share_of_roofline']:.0%}"
            speeds += f" | {whole['first_epoch']['images_per_second']:,.0f}"
            speeds += f" | {whole['later_epochs']['images_per_second']:,.0f} | {whole['data_wait_share']:.0%}"
            overlap = f"{whole['overlap']:.0%}" if "overlap" in whole else ""
            yield f"| {name} | {regime} | {speeds} | {overlap} | {of['peak_memory'].get('gpu_mib')} |"
    yield ""
    yield from (f"{name}: {found[name]['verdict']}" for name in names)
    yield ""


def peers(found: dict[str, Any]) -> Iterator[str]:
    """Of peers/compare.py."""
    if "peers" not in found:
        return
    yield "| contestant | images/s | GPU MiB |"
    yield "|---|---|---|"
    for name, rounds in found["peers"]["jobs"]["full"].items():
        for result in rounds:
            yield f"| {name} | {result['images_per_second']:,.0f} | {result['peak_gpu_memory_mib']} |"


if __name__ == "__main__":
    main()
