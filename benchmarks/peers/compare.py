"""The peers and resnet-dist on the same job, in turns on one machine: steps timed, accuracy beside them.

    python -m venv peers && peers/bin/pip install -r benchmarks/peers/requirements.txt
    python benchmarks/peers/compare.py --data hymenoptera --weights resnet18.safetensors --peers peers/bin/python

Job "full": a resnet18 with ImageNet's weights is fine-tuned on random crops of 224 pixels, batch 32, no two contestants
at once, round after round (A B C A B C ...); each round times a few steps, files to update. Job "accuracy": the same
for whole epochs, once for each seed. Job "head": ten epochs of the head without random changes, the wall-clock of the
whole process. Every contestant validates after each epoch and uses what its own documentation or tuning guide says;
`accelerate launch` is called plainly. Ratios are medians over the rounds. Takes about three quarters of an hour on two
cores; with `--rounds 1 --steps 2 --jobs full` a minute or two, to see that it runs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LAUNCH = ["-m", "accelerate.commands.launch"]
PEERS = {  # contestant: what its Python is given, with the options behind the job's
    "torchvision references, fp32": ["torchvision_loop.py"],
    "timm as documented, fp32": ["timm_loop.py"],
    "timm tuned, bf16 channels_last": ["timm_loop.py", "--tuned"],
    "fastai, fp32": ["fastai_loop.py"],
    "accelerate cv_example, plain launch, fp32": [*LAUNCH, "accelerate_loop.py"],
}
OURS = {"resnet-dist": ["ours.py", "--"], "resnet-dist, fp32": ["ours.py", "--", "--mixed-precision", "no"]}
FLOORS = {  # of the ratio resnet-dist / peer in images per second
    "torchvision references, fp32": 2.0,
    "timm as documented, fp32": 2.0,
    "timm tuned, bf16 channels_last": 1.1,
    "fastai, fp32": 2.0,
    "accelerate cv_example, plain launch, fp32": 3.7,
}
FP32_FLOOR, HEAD_FLOOR = 1.1, 7.0
EPOCHS = {"full": 1000, "accuracy": 4, "head": 10}  # of the first, the clock ends it
Found = dict[str, dict[str, list[dict[str, Any]]]]  # job: contestant: a result per round


def main() -> None:
    """Run the rounds, write the JSON file, print the tables."""
    options = parse_arguments()
    found: Found = {job: {name: [] for name in options.only} for job in options.jobs}
    turns = {"full": options.rounds, "accuracy": options.seeds, "head": 1}
    for job in options.jobs:
        for number, name in product(range(turns[job]), options.only):
            found[job][name].append(contest(name, job, number, options))
    results = {"machine": machine(), "rounds": options.rounds, "steps": options.steps}
    results |= {"batch_size": options.batch_size, "epochs": EPOCHS, "jobs": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(tables(results)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True, help="a resnet18 trained on ImageNet, .safetensors")
    parser.add_argument("--peers", required=True, help="the Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="that are timed in a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--jobs", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--only", nargs="+", choices=[*PEERS, *OURS], default=[*PEERS, *OURS])
    parser.add_argument("--seeds", type=int, default=3, help="runs of whole epochs to see the accuracy")
    parser.add_argument("--json", type=Path, default=HERE.parent / "results" / "peers.json")
    return parser.parse_args()


def contest(name: str, job: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One contestant's process: what it reports, and the wall-clock of all of it."""
    python, command = (options.peers, PEERS[name]) if name in PEERS else (sys.executable, OURS[name])
    place = next(index for index, word in enumerate(command) if word.endswith(".py"))
    launcher, script, own = command[:place], HERE / command[place], command[place + 1 :]
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        out = Path(folder) / "out.json"
        arguments = ["--job", "head" if job == "head" else "full", "--data", options.data, "--seed", seed]
        arguments += ["--weights", options.weights, "--epochs", EPOCHS[job], "--batch-size", options.batch_size]
        arguments += ["--json", out, "--warmup", options.warmup]
        arguments += ["--steps", options.steps] if job == "full" else []
        words = [str(word) for word in (python, *launcher, script, *arguments, *own)]
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        print(f"{name}, {job} {seed} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        done = subprocess.run(words, stdout=sys.stderr, env=environment, check=False)
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}")
        report: dict[str, Any] = json.loads(out.read_text())
        return {**report, "wall_seconds": time.perf_counter() - start}


def machine() -> dict[str, Any]:
    """What it was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else platform.processor(), "cores": cores, "python": platform.python_version()}


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Both jobs as markdown, our ratio to each peer beside its target."""
    jobs: Found = results["jobs"]
    versions = {}
    for rounds in (rounds for job in jobs.values() for rounds in job.values()):
        versions |= rounds[-1]["versions"]
    yield f"{results['machine']['cpu']}, {results['machine']['cores']} cores, {results['rounds']} rounds"
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    if jobs.get("full"):
        yield ""
        yield "| full fine-tuning | images/s, median (lowest to highest) | resnet-dist / it | target | MiB |"
        yield "|---|---|---|---|---|"
        yield from (full_row(name, jobs["full"]) for name in jobs["full"])
    if jobs.get("accuracy"):
        yield ""
        yield f"| {results['epochs']['accuracy']} epochs of full fine-tuning | top-1, mean (each seed) | MiB |"
        yield "|---|---|---|"
        yield from (accuracy_row(name, rounds) for name, rounds in jobs["accuracy"].items())
    if jobs.get("head"):
        yield ""
        yield f"| {results['epochs']['head']} epochs of the head | seconds | it / resnet-dist | target | top-1 | MiB |"
        yield "|---|---|---|---|---|---|"
        yield from (head_row(name, jobs["head"]) for name in jobs["head"])


def full_row(name: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """A contestant's line; the float32 ratio behind the other."""
    rates = [result["images_per_second"] for result in found[name]]
    spread = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
    ratios, targets = [], []
    if name in PEERS:
        ratios = [f"{ratio(found, own, name, 'images_per_second'):.2f}" for own in OURS if own in found]
        targets = [f">= {FLOORS[name]}", *([f">= {FP32_FLOOR} in fp32"] if name.endswith("fp32") else [])]
    memory = statistics.median(result["peak_memory_mib"] for result in found[name])
    return f"| {name} | {spread} | {', '.join(ratios)} | {', '.join(targets)} | {memory:.0f} |"


def accuracy_row(name: str, rounds: list[dict[str, Any]]) -> str:
    """A contestant's line: how good it was after whole epochs, and what they took in memory."""
    scores = [result["top1"] for result in rounds]
    memory = statistics.median(result["peak_memory_mib"] for result in rounds)
    return f"| {name} | {statistics.mean(scores):.3f} ({', '.join(f'{s:.3f}' for s in scores)}) | {memory:.0f} |"


def head_row(name: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """A contestant's line: from the start of its process to the end."""
    result, own = found[name][-1], found.get("resnet-dist")
    ratio_ = f"{result['wall_seconds'] / own[-1]['wall_seconds']:.1f}" if own and name in PEERS else ""
    target = f">= {HEAD_FLOOR:.0f}" if name in PEERS else ""
    memory = result["peak_memory_mib"]
    return f"| {name} | {result['wall_seconds']:.1f} | {ratio_} | {target} | {result['top1']:.3f} | {memory} |"


def ratio(found: dict[str, list[dict[str, Any]]], one: str, other: str, what: str) -> float:
    """The median over the rounds of that round's ratio."""
    pairs = zip(found[one], found[other], strict=True)
    return statistics.median(a[what] / b[what] for a, b in pairs)


if __name__ == "__main__":
    main()
