"""Launches, copies and waits of a training step on a GPU, counted without one: `python benchmarks/step_launches.py`.

Prints the table of benchmarks/README.md. The steps are the program's own, on tensors of `cuda:0` that have shapes but
no values (tests/training/fake_cuda.py). The backward pass is not counted: it does not run on such tensors.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = "--weights none --img-size 64 --workers 0 --threads 1 --no-report --batch-size 8"
STEPS = {
    "SGD, float32": "--opt sgd --mixed-precision no",
    "SGD, EMA, float32": "--opt sgd --mixed-precision no --ema",
    "SGD, EMA, bf16": "--opt sgd --mixed-precision bf16 --ema",
    "SGD, EMA, fp16": "--opt sgd --mixed-precision fp16 --ema",
    "AdamW, EMA, clipping, bf16": "--opt adamw --mixed-precision bf16 --ema --clip-grad 1",
    "SGD, EMA, bf16, augmented on the GPU": "--opt sgd --mixed-precision bf16 --ema --cache device --augment-on device",
    "head from kept features, bf16": "--recipe feature-extractor-bn-eval --aug none --mixed-precision bf16",
}
NETWORKS = ("resnet18", "resnet50")
AT_ONCE = 3  # cases in a process: after too many, torch 2.15 ends with a segmentation fault on such tensors


def main() -> None:
    """Count every step of every network, and print the table."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import make_folder

    with tempfile.TemporaryDirectory() as name:
        images = make_folder(Path(name) / "images")
        found = {network: counted(network, images, Path(name) / "cases.json") for network in NETWORKS}
    print("\n".join(table(found)))


def counted(network: str, images: Path, file: Path) -> dict[str, dict[str, Any]]:
    """What was counted in every step of a network: in processes of their own, since torch is patched there."""
    found = {}
    for start in range(0, len(STEPS), AT_ONCE):
        cases = {
            name: {"options": ["--model", network, *SHARED.split(), *STEPS[name].split()], "plant": None}
            for name in list(STEPS)[start : start + AT_ONCE]
        }
        file.write_text(json.dumps(cases))
        command = [sys.executable, "-m", "tests.training.fake_cuda", str(images), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(f"{network}, code {done.returncode}: {done.stderr[-4000:]}")
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
        found |= {line["name"]: line for line in lines}
    return found


def table(found: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Rows of Markdown; the copies are those from the host to the device, which are among the launches."""
    yield "| step | " + " | ".join(f"{network}: launches | copies | waits" for network in found) + " |"
    yield "|---" * (1 + 3 * len(found)) + "|"
    for step in STEPS:
        rows = [found[network][step] for network in found]
        cells = [f"{row['launches']} | {row['copies']} | {len(row['noted'])}" for row in rows]
        yield f"| {step} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
