"""What needs a GPU: every precision trains to losses near the CPU's, alone and in a DDP group of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = [*TINY, "--img-size", "32", "--batch-size", "8", "--epochs", "2", "--lr", "0.01", "--log-every", "1"]
OPTIONS += ["--batch-norm-stats", "frozen"]


def losses(folder: Path, run: Path, *options: str, launch: tuple[str, ...] = (), **environment: str) -> list[float]:
    command = [sys.executable, *launch, "-m", "resnet_dist", "train", str(folder), *OPTIONS, *options, "-o", str(run)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_cpu(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(folder, tmp_path_factory.mktemp("cpu") / "run", ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 2e-3), ("bf16", 0.1), ("fp16", 0.05)])
@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_losses_are_near_the_cpus(
    folder: Path, on_cpu: list[float], tmp_path: Path, precision: str, tolerance: float, model: str
) -> None:
    expected = on_cpu
    if model != "resnet18":
        expected = losses(folder, tmp_path / "cpu", "--model", model, ACCELERATE_USE_CPU="true")
    tf32 = ["--no-tf32"] if precision == "no" else []
    found = losses(folder, tmp_path / "gpu", "--model", model, "--mixed-precision", precision, *tf32)
    assert found == pytest.approx(expected, rel=tolerance)


def test_a_ddp_group_of_one(folder: Path, on_cpu: list[float], tmp_path: Path) -> None:
    """One rank under NCCL: what DDP adds changes nothing."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    found = losses(folder, tmp_path / "run", "--no-tf32", launch=launch)
    assert found == pytest.approx(on_cpu, rel=2e-3)
