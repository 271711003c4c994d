"""A gradient that is not finite never reaches the parameters, and ends the run with code 5 on all processes alike."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import resnet_dist.train.loop as loop
from resnet_dist.data.transforms import Batch, ToInput
from resnet_dist.errors import NonFiniteError
from tests.conftest import TINY
from tests.train.helpers import job_of

OPTIONS = [*TINY, "--batch-size", "4", "--epochs", "3", "--log-every", "3", "--save-every", "2steps"]


def poison(monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
    """The input of one training step becomes NaN."""
    calls = []
    real = ToInput.__call__

    def spoilt(self: ToInput, batch: Batch) -> torch.Tensor:
        x = real(self, batch)
        if batch.keys.any():  # of training
            calls.append(1)
        return x * float("nan") if len(calls) == at_call and batch.keys.any() else x

    monkeypatch.setattr(ToInput, "__call__", spoilt)


@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw", "adagrad", "rmsprop"])
def test_parameters_stay_those_of_the_last_finite_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opt: str
) -> None:
    """Step 4 of 6 is spoilt; steps 5 and 6 come before the next poll and must not move anything either."""
    job = job_of(tmp_path / "run", folder, *OPTIONS, "--opt", opt, "--lr", "1e-3", "--ema", "--save-every", "9steps")
    poison(monkeypatch, at_call=4)
    seen = []
    real = loop.update

    def watched(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        seen.append(copy.deepcopy([p.detach() for p in job.model.parameters()]))

    monkeypatch.setattr(loop, "update", watched)
    with pytest.raises(NonFiniteError, match="in the steps before step 6"):
        loop.train(job)
    assert len(seen) == 6
    moved = [any(not torch.equal(a, b) for a, b in zip(seen[i], seen[i + 1], strict=True)) for i in range(5)]
    assert moved == [True, True, False, False, False]
    assert job.ema is not None
    assert all(torch.isfinite(p).all() for p in [*job.model.parameters(), *job.ema.module.parameters()])


def test_run_says_which_checkpoint_is_finite(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """Step 3 is spoilt: the checkpoint after step 2 is named, that after step 4 is not written."""
    run = tmp_path / "run"
    poison(monkeypatch, at_call=4)  # the picture of the training samples is the first call
    said = refused(5, "train", folder, *OPTIONS, "--lr", "1e-3", "-o", run)
    assert f"the last checkpoint ({run}/checkpoints/step-000000002) is finite" in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000002"]
    tensors = load_file(run / "checkpoints/step-000000002/state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    facts = json.loads((run / "run.json").read_text())
    assert (facts["status"], facts["exit_code"]) == ("failed", 5)
