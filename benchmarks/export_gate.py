"""What `resnet-dist export` proves before a file gets its name: every network, head, stem and kind of file.

    python benchmarks/export_gate.py --data hymenoptera --weights resnet18.safetensors

`--data` is a folder with train/ and val/ of photographs, at least 64 in each; `--weights` a resnet18 trained on
ImageNet. Each network of CASES is trained with the package's own train verb and exported three times: as a user calls
it (float32, gate on 64 images), with fp16 and int8 on all validation images, and with normalisation in the graph on
all of them. Times are of the whole command in a process of its own. A markdown table goes to stdout, everything else
that the gate reports into the JSON file of `--out`. Takes about an hour on two cores; `--only` and `--train-options`
are for trying it out.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resnet_dist.runtime import environment as launcher

FINE_TUNED = "--model resnet18 --recipe feature-extractor-bn-eval --lr 1e-2 --epochs 3 --batch-size 32"
FROM_SCRATCH = "--weights none --opt adam --epochs 1 --batch-size 8"
CASES = {
    "resnet18": FINE_TUNED,
    "resnet18, head mlp": f"{FINE_TUNED} --head mlp",
    "resnet18, head concat-pool": f"{FINE_TUNED} --head concat-pool",
    "resnet18, small stem": f"{FROM_SCRATCH} --model resnet18 --stem small --img-size 32",
    **{f"resnet{depth}": f"{FROM_SCRATCH} --model resnet{depth}" for depth in (34, 50, 101, 152)},
}
EXPORTS = {
    "float": ["--providers", "cpu"],
    "smaller": ["--providers", "cpu", "--full", "--fp16", "--int8"],
    "in-graph": ["--providers", "cpu", "--full", "--preprocess-in-graph"],
}
COLUMNS = "network|weights|file|images|top-1 torch|top-1 file|logits off by|share of the largest|top-1 equal|MiB|gate"
REFUSED = 6


def main() -> None:
    """Train, export and measure every case."""
    options = parse_arguments()
    results: dict[str, Any] = {"machine": machine(), "data": Path(options.data).name, "cases": {}}
    for name in options.only or CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="export-gate-") as folder:
            results["cases"][name] = measure(CASES[name], options, Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(tables(results)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", required=True, help="a resnet18 trained on ImageNet, .safetensors or .pth")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "export_gate.json")
    parser.add_argument("--only", nargs="+", choices=CASES, help="some of the networks")
    parser.add_argument("--train-options", default="", help="more options for training, such as '--img-size 32'")
    return parser.parse_args()


def measure(train_options: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One network: its training options, and the report and the seconds of each export."""
    train = shlex.split(f"{train_options} {options.train_options}")
    if "none" not in train:
        train += ["--weights", options.weights]
    run_program("train", options.data, *train, "-o", folder / "run")
    case: dict[str, Any] = {"train": train_options, "exports": {}}
    for kind, arguments in EXPORTS.items():
        start = time.perf_counter()
        run_program("export", folder / "run", *arguments, "-o", folder / kind, accept=(0, REFUSED))
        seconds = round(time.perf_counter() - start, 1)
        report = json.loads((folder / kind / "export_report.json").read_text())
        report |= {name: report[name]["cpu"] for name in report["files_mib"]}
        case["exports"][kind] = {"seconds": seconds, "report": report}
    case["in_graph_against_float"] = compare_graphs(folder)
    return case


def compare_graphs(folder: Path) -> dict[str, Any] | None:
    """Logits of the two float32 files on the images that eval saw; None where the gate refused one of them."""
    import numpy as np

    from export.predict import Predictor
    from resnet_dist.data.index import read_run_part

    files = [folder / kind / "model.onnx" for kind in ("float", "in-graph")]
    if not all(file.exists() for file in files):
        return None
    plain, in_graph = (Predictor(file, providers="cpu") for file in files)
    table = read_run_part(folder / "run", "val", plain.classes)
    loaded = (plain.load(table.root / path)[1] for path in table.paths)
    pairs = [(plain.logits(image[None]), in_graph.logits(image[None])) for image in loaded if image is not None]
    off = max(float(np.abs(one - other).max()) for one, other in pairs)
    return {
        "images": len(pairs),
        "bit_equal": all(np.array_equal(*pair) for pair in pairs),
        "max_logit_difference": off,
    }


def tables(results: dict[str, Any]) -> Iterator[str]:
    """The gate's values and the seconds, as markdown."""
    yield f"| {COLUMNS.replace('|', ' | ')} |"
    yield "|---" * (COLUMNS.count("|") + 1) + "|"
    for name, case in results["cases"].items():
        weights = "random, one epoch" if "--weights none" in case["train"] else "fine-tuned"
        for kind, file, cells in file_rows(case):
            yield f"| {name} | {weights} | {file}{', in-graph' if kind == 'in-graph' else ''} | {' | '.join(cells)} |"
    yield ""
    yield "| network | float on 64, s | float, fp16, int8 on all, s | in-graph on all, s | in-graph equals float |"
    yield "|---|---|---|---|---|"
    for name, case in results["cases"].items():
        seconds = " | ".join(f"{case['exports'][kind]['seconds']}" for kind in EXPORTS)
        same = case["in_graph_against_float"]
        yield f"| {name} | {seconds} | {'not compared' if same is None else same['bit_equal']} |"


def file_rows(case: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """(kind of export, file, cells from `images` on), of the exports with a gate on all images."""
    for kind in ("smaller", "in-graph"):
        report = case["exports"][kind]["report"]
        largest = max(1.0, report["model.onnx"]["max_logit"])
        for file, mib in report["files_mib"].items():
            part = report[file]
            smaller = "agreement" in part
            one, other, same = (
                ("accuracy_fp32", "accuracy", "agreement")
                if smaller
                else ("accuracy_torch", "accuracy_onnx", "top1_agreement")
            )
            interval = " ({:.3f} to {:.3f})".format(*part["agreement_interval"]) if smaller else ""
            off = part["max_logit_difference"]
            cells = [
                str(part["images"]),
                f"{part[one]:.4f}",
                f"{part[other]:.4f}",
                f"{off:.1e}",
                f"{off / largest:.1e}",
            ]
            cells += [f"{part[same]:.4f}{interval}", str(mib), "refused" if part["problems"] else "passed"]
            yield kind, file, cells


def run_program(*arguments: str | Path, accept: Sequence[int] = (0,)) -> None:
    """`resnet-dist ARGUMENTS`, its output in our stderr; any other exit code ends the benchmark."""
    done = subprocess.run([sys.executable, "-m", "resnet_dist", *map(str, arguments)], stdout=sys.stderr, check=False)
    if done.returncode not in accept:
        sys.exit(f"resnet-dist {arguments[0]} ended with {done.returncode}")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "numpy", "pillow", "resnet-dist")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": launcher.cores(),
        "load_before": round(os.getloadavg()[0], 2),
        "vnni": bool({"avx512_vnni", "avx_vnni"} & launcher.cpu_flags()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
