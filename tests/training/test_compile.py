"""Compiling changes the speed of a step and not what it computes; by itself only where it pays."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resnet_dist.training import loop
from resnet_dist.training.compile import pays
from resnet_dist.training.loop import train
from tests.conftest import TINY
from tests.training.helpers import job_of

SHORT = [*TINY, "--trainable", "layer4 head", "--epochs", "2", "-b", "8", "--log-every", "1", "--lr", "0.001"]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.matrix
@pytest.mark.filterwarnings("default")  # torch's compiler has warnings of its own
def test_compiled_steps_equal_plain_steps(folder: Path, tmp_path: Path) -> None:
    """Dropout's masks, which differ from step to step, included. What is frozen is computed once and not compiled."""
    if shutil.which("g++") is None:
        pytest.skip("torch's compiler needs g++ on a CPU")
    for how in ("off", "on"):
        train(job_of(tmp_path / how, folder, *SHORT, "--dropout", "0.5", "--aug", "none", "--compile", how))
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)


def test_auto_compiles_once_it_pays(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def pays_at_last(_: torch.device, left: int, seconds: float) -> bool:
        asked.append(left)
        assert seconds > 0
        return left <= 4

    calls: list[int] = []

    def counted(net: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: calls.append(len(images)) or net(images)

    monkeypatch.setattr(loop, "pays", pays_at_last)
    monkeypatch.setattr(loop, "compiled", counted)
    train(job_of(tmp_path / "auto", folder, *SHORT))
    assert asked == [5, 4] and calls == [8] * 4  # six steps in all, asked after the first and the second
    train(job_of(tmp_path / "off", folder, *SHORT, "--compile", "off"))
    assert losses(tmp_path / "auto") == losses(tmp_path / "off")


def test_compile_is_chosen_if_it_saves_time() -> None:
    assert not pays(torch.device("cpu"), 10**6, 1.0)
    assert pays(torch.device("cuda"), 10_000, 0.1)
    assert not pays(torch.device("cuda"), 1_000, 0.1)
