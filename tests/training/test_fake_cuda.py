"""The training step and the evaluation on a GPU that is not there: no wait for the device, no copy that blocks.

`tests.training.fake_cuda` runs the program's own code on fake tensors of `cuda:0`, in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.training.fake_cuda import PLANTS

OPTIONS = [*TINY[: TINY.index("--mixed-precision")], "--no-report", "--batch-size", "8"]
CASES = {
    "sgd": "--opt sgd --mixed-precision no",
    "sgd with EMA": "--opt sgd --mixed-precision no --ema",
    "momentum 0": "--opt sgd --momentum 0 --mixed-precision bf16 --clip-grad 1 --smoothing 0.1",
    "adam, concat head": "--opt adam --mixed-precision fp16 --ema --head concat-pool --dropout 0.3",
    "adamw, mixup": "--opt adamw --mixed-precision bf16 --grad-accum 2 --mixup 0.4 --class-weights balanced",
    "rmsprop, cutmix": "--opt rmsprop --mixed-precision fp16 --cutmix 1 --class-weights balanced --head mlp",
    "adagrad, focal": "--opt adagrad --mixed-precision no --loss focal --class-weights balanced",
    "feature extractor": "--recipe feature-extractor --mixed-precision bf16 --cache-features off",
    "kept features": "--recipe feature-extractor-bn-eval --aug none --cache-features 1 --mixed-precision fp16",
    "BatchNorm alone": "--recipe bn-only --mixed-precision fp16 --clip-grad 1 --ema",
    "discriminative": "--recipe discriminative --mixed-precision bf16 --grad-accum 2",
    "changes on the device": "--opt sgd --mixed-precision bf16 --cache device --augment-on device --color-jitter 0.3 "
    "--rotation 10 --erasing 0.5 --mixup 0.4",
    "frozen statistics": "--recipe discriminative-bn-frozen --mixed-precision fp16 --smoothing 0.1",
}
# torch has no fused RMSprop, so the host must know whether to take the step.
WAITS = {"rmsprop, cutmix": "a wait for the device at optim.py: optimizer.step()"}
AT_ONCE = 7  # cases in a process: after a dozen, torch 2.15 ends with a segmentation fault within FakeTensorMode
MOST_LAUNCHES = {
    "sgd": 97,
    "sgd with EMA": 99,
    "adam, concat head": 182,
    "kept features": 37,
    "changes on the device": 282,
}


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was noted in every case, and in the plain case with each fault planted."""
    file = tmp_path_factory.mktemp("fake") / "cases.json"
    cases = {name: {"options": [*OPTIONS, *text.split()], "plant": None} for name, text in CASES.items()}
    weighted = [*OPTIONS, "--opt", "sgd", "--mixed-precision", "bf16", "--class-weights", "balanced"]
    cases |= {plant: {"options": weighted, "plant": plant} for plant in PLANTS}
    names, lines = list(cases), []
    for start in range(0, len(names), AT_ONCE):
        file.write_text(json.dumps({name: cases[name] for name in names[start : start + AT_ONCE]}))
        command = [sys.executable, "-m", "tests.training.fake_cuda", str(folder), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        lines += [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(results: dict[str, dict[str, Any]], name: str) -> None:
    assert set(results[name]["noted"]) == ({WAITS[name]} if name in WAITS else set())


@pytest.mark.parametrize("name", PLANTS)
def test_an_injected_fault_is_noticed(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["noted"]


@pytest.mark.parametrize("name", MOST_LAUNCHES)
def test_a_step_launches_no_more_kernels_than_before(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["launches"] <= MOST_LAUNCHES[name]
