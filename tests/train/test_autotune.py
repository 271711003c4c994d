"""The trial decides only what was left open, and what it decides is in force."""

from pathlib import Path

import pytest
import torch

from resnet_dist.cli import main
from resnet_dist.distributed import start
from resnet_dist.train import autotune as trial
from resnet_dist.train.autotune import autotune, workers_for
from resnet_dist.train.job import draw
from tests.conftest import TINY
from tests.train.helpers import config_of

OPEN = [option for option in TINY if option not in ("--mixed-precision", "no")]


@pytest.mark.parametrize("slow", ["no", "bf16"])
def test_the_faster_precision_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slow: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, tried = trial._step, []

    def step(model: torch.nn.Module, images: torch.Tensor, precision: str) -> None:
        tried.append(precision)
        for _ in range(1 + 3 * (precision == slow)):
            real(model, images, precision)

    monkeypatch.setattr(trial, "_step", step)
    monkeypatch.setattr(trial, "SECONDS", 0.3)
    fast = {"no": "bf16", "bf16": "no"}[slow]
    options = [str(folder), *OPEN, "--autotune", "--epochs", "1", "-o", str(tmp_path / "run")]
    assert main(["train", *options]) == 0
    said = capsys.readouterr().out
    assert f"autotune: precision {fast} (" in said and f"precision {fast} (--mixed-precision)" in said
    assert set(tried) == {"no", "bf16"}
    assert f'mixed_precision = "{fast}"' in (tmp_path / "run/config.toml").read_text()


def test_typed_values_stay_and_the_random_state_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 0.01)
    cfg = config_of(folder, *TINY, "--autotune")
    accelerator, _ = start(cfg.system, cfg.run.seed)
    blueprint = draw(accelerator, cfg)
    before = torch.get_rng_state()
    assert autotune(accelerator, blueprint) == (blueprint.cfg, [])
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_follow_the_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_dist.launcher.cores", lambda: 16)
    monkeypatch.setattr("resnet_dist.launcher.local_world_size", lambda: 2)
    assert workers_for(1000.0, 400.0)[0] == 3  # 2.5 times as fast, and a fifth more
    assert workers_for(100.0, 400.0)[0] == 1
    few, why = workers_for(9000.0, 400.0)
    assert few == 8 and "27 would be needed, 8 cores are there" in why
