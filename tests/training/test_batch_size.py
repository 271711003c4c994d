"""--batch-size auto: the search, one trial step on this machine, and what a run makes of it."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resnet_dist.cli.main import main
from resnet_dist.model.resnet import Architecture
from resnet_dist.runtime.accelerate import start
from resnet_dist.training import batch_size
from resnet_dist.training.batch_size import largest_that_fits, takes_steps
from resnet_dist.training.plan import plan_optimizer
from tests.conftest import TINY
from tests.training.helpers import config_of


@pytest.mark.parametrize("most", [2, 6, 8, 30, 244, 100_000])
def test_the_search_finds_the_largest_size_to_an_eighth(most: int) -> None:
    for limit in range(600):
        tried: list[int] = []

        def fits(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        found, truth = largest_that_fits(fits, most), min(limit, most) // 2 * 2
        assert found % 2 == 0 and found <= truth
        assert truth - found <= max(8 if found >= 64 else 0, found // 8)
        assert found == most or found < 64 or found % 8 == 0
        assert len(tried) == len(set(tried)) <= 20


@pytest.mark.parametrize(
    ("recipe", "opt", "tensors"),
    [("full-finetune", "sgd", [62]), ("discriminative-bn-frozen", "adam", [2, 22]), ("bn-only", "rmsprop", [42])],
)
def test_trial_takes_a_step_of_every_phase(
    recipe: str, opt: str, tensors: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns what the recipe learns, and it leaves the random numbers of the process alone."""
    cfg = config_of(folder, *TINY, "--recipe", recipe, "--opt", opt, "--ema")
    architecture = Architecture.of(cfg.model, 3)
    accelerator, _ = start(cfg.system, cfg.run.seed)
    planned, _ = plan_optimizer(cfg, batch_size.build(architecture), 8)
    learning: list[int] = []
    original = batch_size.build_optimizer

    def counted(groups: list[dict[str, object]], planned: batch_size.PlannedOptimizer) -> torch.optim.Optimizer:
        optimizer = original(groups, planned)
        learning.append(len(optimizer.param_groups[0]["params"]))
        return optimizer

    monkeypatch.setattr(batch_size, "build_optimizer", counted)
    before = torch.get_rng_state()
    assert takes_steps(accelerator, cfg, architecture, (4, 3, 16, 16), planned)
    assert torch.equal(torch.get_rng_state(), before)
    assert learning == tensors


def test_lack_of_memory_is_no_step_and_another_error_is_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config_of(folder, *TINY)
    architecture = Architecture.of(cfg.model, 3)
    accelerator, _ = start(cfg.system, cfg.run.seed)
    planned, _ = plan_optimizer(cfg, batch_size.build(architecture), 8)

    def failing(error: Exception) -> Callable[..., None]:
        def step(*_: object) -> None:
            raise error

        return step

    monkeypatch.setattr(batch_size, "_step", failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")))
    assert not takes_steps(accelerator, cfg, architecture, (4, 3, 16, 16), planned)
    monkeypatch.setattr(batch_size, "_step", failing(RuntimeError("CUDA error: device-side assert")))
    with pytest.raises(RuntimeError, match="device-side assert"):
        takes_steps(accelerator, cfg, architecture, (4, 3, 16, 16), planned)


def test_a_cpu_takes_the_default_and_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run stores the number, so that it is resumed with it."""
    run = tmp_path / "run"
    options = [*TINY, "--recipe", "feature-extractor-bn-eval", "--epochs", "1", "--batch-size", "auto"]
    assert main(["train", str(folder), *options, "-o", str(run)]) == 0
    said = capsys.readouterr().out
    assert "batch size 32 (automatic: only GPUs are measured)" in said and "global batch 32 = 32 per process" in said
    stored = tomllib.loads((run / "config.toml").read_text())["data"]
    assert stored["batch_size"] == stored["global_batch_size"] == 32
    assert json.loads((run / "run.json").read_text())["status"] == "done"


def test_what_does_not_go_with_auto(folder: Path, refused: Callable[..., str]) -> None:
    said = refused(2, "train", folder, *TINY, "-b", "auto", "--global-batch-size", "64")
    assert "--global-batch-size" in said and "give one of them" in said
    assert "give the number of images to measure" in refused(2, "bench", *TINY[:-1], "-b", "auto")
    assert "must be a whole number, not 'many'" in refused(2, "train", folder, *TINY, "-b", "many")
