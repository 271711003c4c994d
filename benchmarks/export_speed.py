"""Speed and size of exported models relative to torch, measured alternately on one machine.

    python benchmarks/export_speed.py --data hymenoptera

`--data` is a folder with train/ and val/ of photographs, at least 64 in each. The networks have random weights, which
take the same time as trained weights. Each is trained for an epoch and exported with int8 and with normalisation in the
graph. Every contestant has its own process, and only one works at a time (A B C A B C ...), so that neither the load of
the machine nor idle threads of one runtime favour another. Cold start and peak memory are measured in fresh processes,
also alternately. A ratio is the median over the ratios of the rounds, with the lowest and the highest. A markdown table
with the targets is written to stdout, and the measurements to the JSON file of `--out`. It takes about a quarter of an
hour on two cores; `--networks`, `--rounds`, `--photos` and `--train-options` make it shorter.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# This process loads neither torch nor numpy: on Linux, the peak memory of a child is at least that of its parent.
from export_gate import machine, run_program

Step = Callable[[], object]
Measured = dict[str, list[float]]  # contestant: a value per round

TRAIN = "--weights none --opt adam --epochs 1 --batch-size 8"
REPEATS = {1: 10, 32: 2}  # of a batch of that size in a round
FILES = {"fp32": "float/model.onnx", "int8": "float/model.int8.onnx", "in-graph": "in-graph/model.onnx"}
RATIOS = (  # what is said, the measurement, what is divided by what, the target
    ("torch eager / fp32 file, batch 1", "batch 1, s", "torch", "fp32", ">= 1.25"),
    ("torch eager / fp32 file, batch 32", "batch 32, s", "torch", "fp32", ">= 1.5"),
    ("fp32 file / int8 file, batch 1", "batch 1, s", "fp32", "int8", ">= 2.5 with VNNI"),
    ("fp32 file / int8 file, batch 32", "batch 32, s", "fp32", "int8", ">= 2.5 with VNNI"),
    ("in-graph / float, batch 1", "batch 1, s", "in-graph", "fp32", "<= 1.05"),
    ("in-graph / float, batch 32", "batch 32, s", "in-graph", "fp32", "<= 1.05"),
    ("DataLoader loop / folder prediction, fp32", "folder, s", "torch", "fp32", ">= 1.4"),
    ("DataLoader loop / folder prediction, int8", "folder, s", "torch", "int8", ">= 3.5"),
    ("cold start to first label, fp32 / torch", "cold start, s", "fp32", "torch", "<= 0.25"),
    ("cold start to first label, int8 / torch", "cold start, s", "int8", "torch", "<= 0.25"),
    ("peak memory, fp32 / torch", "peak memory, MiB", "fp32", "torch", "<= 0.30 resnet18, 0.40 resnet50"),
    ("peak memory, int8 / torch", "peak memory, MiB", "int8", "torch", "<= 0.25"),
)
TORCH_PIPELINE = """
import sys, torch, torchvision
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2
network, checkpoint, photo, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
weights = load_file(checkpoint)
model = getattr(torchvision.models, network)(num_classes=len(weights["fc.bias"])).eval()
model.load_state_dict(weights)
steps = [v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
steps += [v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
with torch.inference_mode():
    print(model(v2.Compose(steps)(Image.open(photo).convert("RGB"))[None]).argmax(1).item())
"""


def main() -> None:
    """Measure every network."""
    options = parse_arguments()
    photos = sorted(map(str, Path(options.data, "val").rglob("*.jpg")))[: options.photos]
    conditions = {"threads": options.threads, "rounds": options.rounds, "photos": len(photos)}
    results: dict[str, Any] = {"machine": machine(), **conditions, "networks": {}}
    for network in options.networks:
        with tempfile.TemporaryDirectory(prefix="export-speed-") as name:
            prepare(network, options, Path(name))
            results["networks"][network] = measure(network, options, Path(name), photos)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(tables(results)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "export_speed.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photos", type=int, default=150, help="of val/, for the prediction of a folder")
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--train-options", default="", help="more options for training, such as '--img-size 32'")
    return parser.parse_args()


def prepare(network: str, options: argparse.Namespace, folder: Path) -> None:
    """A run and its files. int8 of a network that was hardly trained is not refused here, whatever it gives."""
    train = [*shlex.split(f"{TRAIN} {options.train_options}"), "--model", network]
    run_program("train", options.data, *train, "-o", folder / "run")
    int8 = ["--int8", "--max-accuracy-drop", "100", "--min-agreement", "0"]
    run_program("export", folder / "run", *int8, "-o", folder / "float")
    run_program("export", folder / "run", "--preprocess-in-graph", "-o", folder / "in-graph")


def measure(network: str, options: argparse.Namespace, folder: Path, photos: Sequence[str]) -> dict[str, Measured]:
    """Everything about one network, by the names that RATIOS has."""
    checkpoint, threads = folder / "run/checkpoints/best.safetensors", options.threads
    found: dict[str, Measured] = {}
    for batch, repeats in REPEATS.items():
        contestants: dict[str, Callable[[], Step]] = {"torch": partial(torch_batch, checkpoint, batch, threads)}
        contestants |= {name: partial(onnx_batch, folder / file, batch, threads) for name, file in FILES.items()}
        found[f"batch {batch}, s"] = take_turns(contestants, options.rounds, repeats)
    contestants = {"torch": partial(torch_folder, checkpoint, photos, threads)}
    contestants |= {name: partial(onnx_folder, folder / FILES[name], photos, threads) for name in ("fp32", "int8")}
    found["folder, s"] = take_turns(contestants, options.rounds, 1)
    commands = {"torch": [sys.executable, "-c", TORCH_PIPELINE, network, checkpoint, photos[0], threads]}
    for name in ("fp32", "int8"):
        file = folder / FILES[name]
        commands[name] = [sys.executable, file.with_name("predict.py"), file, photos[0], "--threads", threads]
    found["cold start, s"], found["peak memory, MiB"] = fresh_processes(commands, options.rounds)
    return found


def take_turns(contestants: Mapping[str, Callable[[], Step]], rounds: int, repeats: int) -> Measured:
    """Seconds of a step of each, the median of the repeats in every round; all are started and warm before."""
    context = get_context("spawn")
    found: Measured = {name: [] for name in contestants}
    with ExitStack() as closed_at_the_end:
        lines = {}
        for name, make in contestants.items():
            line, other = context.Pipe()
            context.Process(target=serve, args=(other, make)).start()
            other.close()
            lines[name] = closed_at_the_end.enter_context(line)
            line.recv()
        for _ in range(rounds):
            for name, line in lines.items():
                line.send(repeats)
                found[name].append(line.recv())
    return found


def serve(line: Connection, make: Callable[[], Step]) -> None:
    """One contestant: warms up, takes steps when it is told, and answers with their median in seconds."""
    step = make()
    step()
    line.send("ready")
    with suppress(EOFError):  # the line is closed: the end
        while repeats := line.recv():
            line.send(statistics.median(seconds_of(step) for _ in range(repeats)))


def seconds_of(step: Step) -> float:
    """How long a step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def torch_batch(checkpoint: Path, batch: int, threads: int) -> Step:
    """torch eager on a batch."""
    import torch

    from resnet_dist.model.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    model, description = load_checkpoint(checkpoint)
    model.eval()
    size = description.preprocessing.img_size
    return torch.inference_mode()(partial(model, torch.randn(batch, 3, size, size)))


def onnx_batch(file: Path, batch: int, threads: int) -> Step:
    """The predictor's own session on a batch, which is prepared before."""
    import numpy as np

    from export.predict import Predictor

    predictor = Predictor(file, threads, "cpu")
    size = predictor.preprocessing.img_size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    return partial(predictor._session.run, ["logits"], predictor.inputs(pixels))


class Photos:
    """What a DataLoader needs of a dataset: image files as inputs."""

    def __init__(self, files: Sequence[str], transform: Callable[[Any], Any]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(self.files[index]).convert("RGB"))


def torch_folder(checkpoint: Path, files: Sequence[str], threads: int) -> Step:
    """The usual loop: a DataLoader with a process per thread, batches of 32, best class of each image."""
    import torch
    from torchvision.transforms import v2

    from resnet_dist.model.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    model, description = load_checkpoint(checkpoint)
    model.eval()
    spec = description.preprocessing
    steps = [v2.Resize(spec.resize), v2.CenterCrop(spec.img_size), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
    photos: Any = Photos(files, v2.Compose(steps))
    loader = torch.utils.data.DataLoader(photos, batch_size=32, num_workers=threads, persistent_workers=True)

    @torch.inference_mode()
    def predict() -> list[int]:
        return [best for images in loader for best in model(images).argmax(1).tolist()]

    return predict


def onnx_folder(file: Path, files: Sequence[str], threads: int) -> Step:
    """The predictor as a library."""
    from export.predict import Predictor

    predictor = Predictor(file, threads, "cpu")
    return lambda: list(predictor.predict(files))


def fresh_processes(commands: Mapping[str, Sequence[object]], rounds: int) -> tuple[Measured, Measured]:
    """Seconds from start to end, and peak memory in MiB; a first round that is not counted fills the file cache."""
    seconds: Measured = {name: [] for name in commands}
    memory: Measured = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                sys.exit(f"{name}: the fresh process ended with {process.returncode}")
            if number:
                seconds[name].append(time.perf_counter() - start)
                memory[name].append(usage.ru_maxrss / 1024)
    return seconds, memory


def tables(results: dict[str, Any]) -> Iterator[str]:
    """The ratios with their targets, and the medians that they come from, as markdown."""
    networks: dict[str, dict[str, Measured]] = results["networks"]
    yield f"| ratio, median (lowest to highest) of {results['rounds']} rounds | target | {' | '.join(networks)} |"
    yield "|---" * (2 + len(networks)) + "|"
    for title, what, one, other, target in RATIOS:
        cells = [ratio(found[what][one], found[what][other]) for found in networks.values()]
        yield f"| {title} | {target} | {' | '.join(cells)} |"
    yield ""
    yield f"| median | | {' | '.join(networks)} |"
    yield "|---" * (2 + len(networks)) + "|"
    for what, measured in next(iter(networks.values())).items():
        for name in measured:
            cells = [f"{statistics.median(found[what][name]):.4g}" for found in networks.values()]
            yield f"| {what} | {name} | {' | '.join(cells)} |"


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """Median, lowest and highest of the ratios of the rounds."""
    values = [a / b for a, b in zip(one, other, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
