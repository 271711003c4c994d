"""The trial decides only what was left open, and what it decides is in force."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_dist.cli.main import main
from resnet_dist.runtime.accelerate import start
from resnet_dist.training import autotune as trial
from resnet_dist.training.autotune import autotune, workers_for
from resnet_dist.training.plan import Plan, make_plan
from tests.conftest import TINY
from tests.training.helpers import config_of

OPEN = [option for option in TINY if option not in ("--mixed-precision", "no")]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Pretend that the CPU has bf16, and that one precision is slow by the test's own clock. Returns what is tried."""

    def prepare(slow: str) -> list[str]:
        tried, now = [], [0.0]

        def step(model: torch.nn.Module, images: torch.Tensor, precision: str) -> None:
            tried.append(precision)
            now[0] += 4.0 if precision == slow else 1.0

        monkeypatch.setattr("resnet_dist.runtime.environment.cpu_flags", lambda: {"avx512_bf16"})
        monkeypatch.setattr(trial, "_step", step)
        monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: now[0]))
        return tried

    return prepare


def planned(folder: Path, *options: str) -> tuple[Accelerator, Plan]:
    cfg = config_of(folder, *options)
    accelerator, _ = start(cfg.system, cfg.run.seed)
    return accelerator, make_plan(accelerator, cfg)


def test_the_faster_precision_is_in_force(
    folder: Path, trials: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """float32, on a CPU whose bf16 would be taken without a trial."""
    tried = trials("bf16")
    assert main(["train", str(folder), *OPEN, "--autotune", "--epochs", "1", "-o", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "precision bf16 (this CPU has it)" in said
    assert "autotune: precision float32 (images/s and process: float32 8.0, bf16 2.0)" in said
    assert "precision float32 (--mixed-precision)" in said
    assert set(tried) == {"no", "bf16"}
    assert 'mixed_precision = "no"' in (tmp_path / "run/config.toml").read_text()


def test_bf16_is_taken_if_it_is_faster(folder: Path, trials: Callable[[str], list[str]]) -> None:
    tried = trials("no")
    plan, lines = autotune(*planned(folder, *OPEN, "--autotune"))
    assert plan.cfg.system.mixed_precision == "bf16" and set(tried) == {"no", "bf16"}
    assert lines == ["autotune: precision bf16 (images/s and process: float32 2.0, bf16 8.0)"]


def test_a_cpu_without_bf16_tries_nothing(
    folder: Path, trials: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One emulated step can take longer than the training."""
    tried = trials("bf16")
    monkeypatch.setattr("resnet_dist.runtime.environment.cpu_flags", lambda: {"avx2"})
    accelerator, plan = planned(folder, *OPEN, "--autotune")
    assert autotune(accelerator, plan) == (plan, []) and not tried


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_tried_step_leaves_the_weights_alone(precision: str) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    before = copy.deepcopy(model.state_dict())
    trial._step(model, torch.rand(2, 3, 2, 2), precision)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_given_values_and_the_random_state_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 0.01)
    accelerator, plan = planned(folder, *TINY, "--autotune")
    before = torch.get_rng_state()
    assert autotune(accelerator, plan) == (plan, [])
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_follow_the_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_dist.runtime.environment.cores", lambda: 16)
    monkeypatch.setattr("resnet_dist.runtime.environment.local_world_size", lambda: 2)
    assert workers_for(1000.0, 400.0)[0] == 3  # 2.5 times as fast, and a fifth more
    assert workers_for(100.0, 400.0)[0] == 1
    few, why = workers_for(9000.0, 400.0)
    assert few == 8 and "27 would be needed, 8 cores are there" in why


class Unscaled(TorchDispatchMode):
    """Counts how often gradients are unscaled."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "unscale" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "unscaled"), [("no", 0), ("fp16", 1)])
def test_a_step_of_fp16_is_tried_with_what_it_costs(precision: str, unscaled: int) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with Unscaled() as seen:
        trial._step(model, torch.rand(2, 3, 2, 2), precision)
    assert seen.calls == unscaled
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, value)
