"""How often int8 files give the same top-1 as float32, with and without saturation and onnxruntime's optimisations.

    python benchmarks/export_agreement.py --data hymenoptera --weights resnet18.safetensors --photos cats_dogs

`--data` is a folder with train/ and val/ of photographs, `--photos` a folder of others; `--weights` is a resnet18
trained on ImageNet. Measured are that network with its own 1000 classes, on val/ and on the photographs of `--photos`;
the same with a new head trained for three epochs on `--data`, on val/; and resnet50 with random weights, which shows
whether products saturate and not how good a file is. Ranges are taken from images that are not measured. Each file runs
as onnxruntime runs it by default on this CPU; with `session.x64quantprecision`, which multiplies bytes without
saturation, as CPUs with VNNI do; and without onnxruntime's optimisations, where the products are in float. Takes ten
minutes on two cores.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision
from export_gate import FINE_TUNED, machine, run_program
from safetensors.torch import load_file

from export.predict import Preprocessing, decode, fit, normalise
from export.quantize import to_int8
from export.to_onnx import graph_of
from resnet_dist.evaluation.intervals import wilson
from resnet_dist.model.checkpoint import load_checkpoint

CALIBRATION = 64
RANDOM_IMAGES = 32
DEFAULT, EXACT, OFF = "by default", "without saturation, as with VNNI", "onnxruntime's optimisations off"
COLUMNS = "network|weights|calibration|layers in float|run|images|same top-1|95 % interval|"
COLUMNS += "logits bit-equal to those without saturation"


def main() -> None:
    """Measure every network."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": machine(), "data": options.data.name, "networks": {}}
    for name, model, train, measured in networks(options):
        print(f"{name} ...", file=sys.stderr, flush=True)
        graph = graph_of(model, Preprocessing(), in_graph=False)
        results["networks"][name] = list(measure(graph, train, measured, options.threads))
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(table(results)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with train/ and val/")
    parser.add_argument("--weights", required=True, type=Path, help="a resnet18 trained on ImageNet, .safetensors")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "export_agreement.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--photos", type=Path, help="a folder of other photographs")
    parser.add_argument("--images", type=int, default=150, help="of val/ and of --photos, spread evenly")
    parser.add_argument("--train-options", default="", help="more options for training, such as '--epochs 1'")
    return parser.parse_args()


def spread(folder: Path, count: int, first: int = 0, step: int = 1) -> np.ndarray:
    """`count` photographs as the networks take them, float32 (N, 3, H, W), of every `step`-th file from `first` on."""
    files = sorted(folder.rglob("*.jpg"))[first::step]
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)]
    rows = (normalise(fit(decode(file), Preprocessing()), Preprocessing()) for file in chosen)
    return np.ascontiguousarray(np.stack([row.transpose(2, 0, 1) for row in rows]))


def networks(options: argparse.Namespace) -> Iterator[tuple[str, torch.nn.Module, np.ndarray, np.ndarray]]:
    """(name, network, images for the ranges, images to measure on)."""
    train, val = spread(options.data / "train", CALIBRATION, step=2), spread(options.data / "val", options.images)
    halves = ((options.images, 0), (CALIBRATION, 1))
    others = [spread(options.photos, count, first, step=2) for count, first in halves if options.photos]
    model = torchvision.models.resnet18()
    model.load_state_dict(load_file(options.weights))
    ranges, measured = np.concatenate([train, *others[1:]]), np.concatenate([val, *others[:1]])
    yield "resnet18, ImageNet, 1000 classes", model, ranges, measured
    with tempfile.TemporaryDirectory(prefix="export-agreement-") as folder:
        words = [*shlex.split(f"{FINE_TUNED} {options.train_options}"), "--weights", str(options.weights)]
        run_program("train", options.data, *words, "--threads", str(options.threads), "-o", Path(folder, "run"))
        tuned, description = load_checkpoint(Path(folder, "run/checkpoints/best.safetensors"))
    yield f"resnet18, new head, {len(description.classes)} classes", tuned, train, val
    torch.manual_seed(0)
    yield "resnet50, random weights", torchvision.models.resnet50(), train[:RANDOM_IMAGES], val[:RANDOM_IMAGES]


def measure(graph: onnx.ModelProto, train: np.ndarray, val: np.ndarray, threads: int) -> Iterator[dict[str, Any]]:
    """One row for each number of bits and way to run."""
    expected = logits(graph, val, threads).argmax(1)
    for bits in (7, 8):
        small, choice = to_int8(graph, list(train), reduce_range=bits == 7)
        exact = logits(small, val, threads, EXACT)
        runs = {DEFAULT: logits(small, val, threads), EXACT: exact, OFF: logits(small, val, threads, OFF)}
        for name, found in runs.items():
            same, n = int((found.argmax(1) == expected).sum()), len(val)
            row = {"weight_bits": bits, "run": name, "images": n, "agreement": same / n, "interval": wilson(same, n)}
            row["quantization"] = asdict(choice)
            yield {**row, "images_bit_equal_to_exact": int((found == exact).all(axis=1).sum())}


def logits(graph: onnx.ModelProto, inputs: np.ndarray, threads: int, how: str = "") -> np.ndarray:
    """What onnxruntime gives for the inputs, float32 (N, classes)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1" if how == EXACT else "0")
    if how == OFF:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    batches = (inputs[i : i + 8] for i in range(0, len(inputs), 8))
    return np.concatenate([session.run(["logits"], {"pixel_values": batch})[0] for batch in batches])


def table(results: dict[str, Any]) -> Iterator[str]:
    """All rows as markdown."""
    yield f"| {COLUMNS.replace('|', ' | ')} |"
    yield "|---" * (COLUMNS.count("|") + 1) + "|"
    for name, rows in results["networks"].items():
        for row in rows:
            low, high = row["interval"]
            equal = f"{row['images_bit_equal_to_exact']} of {row['images']}"
            made = row["quantization"]
            left = f"{', '.join(made['float_layers']) or 'none'} of {made['layers']}"
            said = [
                f"{row['weight_bits']} bits",
                made["calibration"],
                left,
                row["run"],
                str(row["images"]),
                f"{row['agreement']:.3f}",
            ]
            yield f"| {name} | {' | '.join(said)} | {low:.3f} to {high:.3f} | {equal} |"


if __name__ == "__main__":
    main()
