"""A gradient that is not finite never reaches the parameters, and ends the run with code 5 on all processes alike."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import resnet_dist.training.loop as loop
from resnet_dist.data.transforms import Batch, ToInput
from resnet_dist.errors import NonFiniteError
from resnet_dist.training.job import Job
from resnet_dist.training.resume import Resumed, restore_learner, save_state
from resnet_dist.training.state import State, read_newest_state
from tests.conftest import TINY
from tests.training.helpers import job_of

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


# fp16: GradScaler's logic is the same on a CPU, with which a job can be given one

FP16 = [*TINY, "--batch-size", "8", "--lr", "0.01", "--log-every", "1", "--save-every", "99steps"]


def fp16_job(run: Path, folder: Path, *options: str, scale: float = 2.0**16) -> Job:
    """A job whose loss is scaled; it has 3 steps in an epoch."""
    job = job_of(run, folder, *FP16, *options)
    job.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return job


def overflow(job: Job, *steps: int) -> None:
    """The gradient of one parameter becomes infinite in these training steps, counted from 0."""
    calls = []

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("inf") if not steps or len(calls) - 1 in steps else gradient

    next(job.model.parameters()).register_hook(hook)


@pytest.mark.parametrize(
    "options",
    [
        ["--opt", "sgd"],
        ["--opt", "sgd", "--nesterov", "--clip-grad", "1"],
        ["--opt", "adagrad"],
    ],
    ids=" ".join,
)
def test_an_overflow_in_the_first_step_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """The skipped step moves nothing, and the second is the step that a run without the first would take."""
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, float("nan")))  # memory of others
    moved = {}
    for name, steps in (("skipped", (0, 1)), ("direct", (1,))):
        job = fp16_job(tmp_path / name, folder, "--epochs", "1", *options)
        learner = loop.begin_phase(job, job.plan.phases[0])
        loop.train_mode(job.model, learner.phase.updating)
        batches = list(learner.source.train_loader.epoch(0))
        start = [parameter.detach().clone() for parameter in job.model.parameters()]
        if name == "skipped":
            overflow(job, 0)
        statistics = {name: value.clone() for name, value in job.model.state_dict().items() if "running" in name}
        for number in steps:
            loop.train_step(job, learner, batches[number])
            if number == 0:
                assert all(torch.equal(a, b) for a, b in zip(start, job.model.parameters(), strict=True))
                assert learner.skipped == 1 and job.accelerator.scaler.get_scale() == 2.0**15
                job.model.load_state_dict(statistics, strict=False)
        moved[name] = [parameter.detach().clone() for parameter in job.model.parameters()]
    for skipped, direct in zip(moved["skipped"], moved["direct"], strict=True):
        torch.testing.assert_close(skipped, direct, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "options", "said"),
    [
        (2.0**16, ["--epochs", "3"], "in each of the 9 steps of phase 1: all of them were skipped"),
        (2.0**-3, ["--epochs", "3"], "a gradient became infinite or NaN in the steps before step 2;"),
        (2.0**16, ["--recipe", "head-then-all", "--phase", "1.epochs=1", "--epochs", "2"], "the 3 steps of phase 1"),
    ],
)
def test_gradients_that_are_never_finite_end_the_run(
    folder: Path, tmp_path: Path, scale: float, options: list[str], said: str
) -> None:
    job = fp16_job(tmp_path / "run", folder, *options, scale=scale)
    (job.model.fc.weight if "head-then-all" in options else next(job.model.parameters())).register_hook(  # type: ignore[union-attr, operator]
        lambda gradient: gradient * float("inf")
    )
    before = copy.deepcopy([parameter.detach() for parameter in job.model.parameters()])
    with pytest.raises(NonFiniteError, match=said) as error:
        loop.train(job)
    assert error.value.exit_code == 5 and "--mixed-precision bf16" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))


def test_skipped_steps_are_counted_and_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 1 and 4 of 6: the run goes on, and says so."""
    job = fp16_job(tmp_path / "run", folder, "--epochs", "2")
    job.display.enabled = True
    overflow(job, 0, 3)
    state = loop.train(job)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [1, 1, 1, 2, 2, 2] and state.skipped == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.partition("skipped ")[2] for line in lines] == ["1 step of this phase", "2 steps of this phase"]


def test_resumed_run_has_the_scale_of_the_interrupted_one(folder: Path, tmp_path: Path) -> None:
    """And the steps until it grows; states from before it was saved still load, with the scale that a run starts at."""
    job = fp16_job(tmp_path / "run", folder, "--epochs", "2")
    overflow(job, 0)
    learner, state = loop.begin_phase(job, job.plan.phases[0]), State()
    loop.train_one_epoch(job, learner, state)
    save_state(job, learner.optimizer, learner.schedule, learner.tally, state)
    tensors, facts, _ = read_newest_state(tmp_path / "run/checkpoints")
    saved = {"scale": 2.0**15, "_growth_tracker": 2}
    assert job.accelerator.scaler.state_dict().items() >= saved.items()
    for name, known, expected in (
        ("new", facts, saved),
        ("old", {key: value for key, value in facts.items() if key != "scaler"}, {"scale": 2.0**16}),
    ):
        again = fp16_job(tmp_path / name, folder, "--epochs", "2")
        new = loop.begin_phase(again, again.plan.phases[0])
        resumed = Resumed(State.from_dict(known["state"]), tensors, known)
        restore_learner(resumed, again, new.optimizer, new.schedule, new.tally)
        assert again.accelerator.scaler.state_dict().items() >= expected.items()
        assert resumed.state.skipped == 1
