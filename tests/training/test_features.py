"""Training from kept features is training: the same numbers as from the images, and only where that is so."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_dist.cli.main import main
from resnet_dist.config.schema import Phase
from resnet_dist.evaluation.collect import collect_records
from resnet_dist.training.features import Features, source
from resnet_dist.training.loop import train
from resnet_dist.training.plan import plan_phase
from tests.conftest import TINY
from tests.runtime.launch import together
from tests.training.helpers import job_of

FROZEN = [*TINY, "--trainable", "head", "--epochs", "3", "--batch-size", "8", "--lr", "0.05", "--log-every", "1"]


def losses(run: Path) -> list[tuple[float, float]]:
    with (run / "metrics.csv").open(newline="") as stream:
        return [(float(row["train_loss"]), float(row["val_loss"])) for row in csv.DictReader(stream)]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainable", "layer4 head", "--dropout", "0.3", "--opt", "adam", "--lr", "0.001"],
        ["--head", "concat-pool", "--head-hidden", "8", "--dropout", "0.5", "--ema"],
        ["--trainable", "layer3 layer4 head", "--grad-accum", "2", "--batch-size", "4", "--lr", "0.001"],
    ],
)
def test_cached_features_give_the_same_result(folder: Path, tmp_path: Path, options: list[str]) -> None:
    """Losses of every epoch and final weights agree to the rounding of float32."""
    results = {}
    for how in ("off", "auto"):
        run = tmp_path / how
        job = job_of(run, folder, *FROZEN, "--aug", "none", *options, "--cache-features", how)
        chosen = source(job, job.plan.phases[0])
        assert isinstance(chosen.train_input, Features) == isinstance(chosen.val_input, Features) == (how == "auto")
        train(job)
        results[how] = losses(run), job.model.state_dict()
    for a, b in zip(results["off"][0], results["auto"][0], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, value in results["off"][1].items():
        torch.testing.assert_close(results["auto"][1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_as_many_views_as_epochs_are_the_augmentation_itself(folder: Path, tmp_path: Path) -> None:
    runs = {}
    for how in ("off", "3", "1"):
        job = job_of(tmp_path / how, folder, *FROZEN, "--cache-features", how)
        train(job)
        runs[how] = losses(tmp_path / how)
    for a, b in zip(runs["off"], runs["3"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert runs["1"][0] == pytest.approx(runs["off"][0], rel=1e-4)
    assert runs["1"][1] != pytest.approx(runs["off"][1], rel=1e-4)  # the first view again


class Allocations(TorchDispatchMode):
    """Counts the new tensors of at least so many rows of this shape."""

    def __init__(self, rows: int, shape: torch.Size) -> None:
        super().__init__()
        self.rows, self.shape, self.places = rows, shape, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape[1:] == self.shape and len(made) >= self.rows:
            self.places.add(made.untyped_storage().data_ptr())
        return made


def test_features_take_their_memory_once(folder: Path, tmp_path: Path) -> None:
    """No second copy while they are put together, of one view or of all."""
    job = job_of(tmp_path / "run", folder, *FROZEN, "--cache-features", "2")
    features = source(job, job.plan.phases[0]).train_input
    assert isinstance(features, Features)
    with Allocations(24, features.example.shape[1:]) as seen:
        features.fill(job)
    assert len(seen.places) == 1
    assert features.values is not None and features.values.nbytes == features.bytes == 2 * 24 * 512 * 4


def test_validation_alone_where_training_images_change(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(tmp_path / "run", folder, *FROZEN)
    job.display.enabled = True
    chosen = source(job, job.plan.phases[0])
    assert chosen.train_module is job.model and isinstance(chosen.val_input, Features)
    said = capsys.readouterr().out
    assert "for validation, " in said and "--cache-features N" in said
    chosen.fill(job)
    arguments = (job.accelerator, chosen.val_module, chosen.val_loader, chosen.val_input, 3, True)
    kept = collect_records(*arguments)
    whole = collect_records(job.accelerator, job.model, job.val_loader, job.to_input, 3, True)
    torch.testing.assert_close(torch.from_numpy(kept.loss), torch.from_numpy(whole.loss))
    assert (kept.target == whole.target).all()


@pytest.mark.parametrize(
    ("phase", "epochs"),
    [
        (Phase(trainable="all"), 3),
        (Phase(trainable="head", batch_norm_stats="update"), 3),
        (Phase(trainable="head"), 1),
        (Phase(trainable="head batchnorm"), 3),
    ],
)
def test_features_are_not_cached_if_wrong_or_useless(folder: Path, tmp_path: Path, phase: Phase, epochs: int) -> None:
    job = job_of(tmp_path / "run", folder, *FROZEN, "--aug", "none")
    plan = job.plan
    chosen = source(job, plan_phase(phase, epochs, job.model, plan.cfg.optim, plan.optimizer))
    assert chosen.train_module is job.model and chosen.val_module is job.model


def test_not_more_than_half_of_the_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path / "run", folder, *FROZEN, "--aug", "none")
    for room, expected in ((24 + 15, (True, True)), (24, (False, True)), (14, (False, False))):
        # 24 training and 15 validation images, 512 numbers of 4 bytes each
        monkeypatch.setattr("resnet_dist.runtime.environment.available_memory", lambda room=room: 2 * room * 512 * 4)
        chosen = source(job, job.plan.phases[0])
        assert (isinstance(chosen.train_input, Features), isinstance(chosen.val_input, Features)) == expected


def test_phase_by_phase(folder: Path, tmp_path: Path) -> None:
    """Kept features in the first phase do not outlive it: the second, where all learns, equals that without."""
    two = ["--recipe", "head-then-all", "--phase", "1.epochs=2", "--epochs", "3", "--aug", "none", "--lr", "0.01"]
    two += ["--phase", "1.batch_norm_stats=frozen"]
    for how in ("off", "auto"):
        train(job_of(tmp_path / how, folder, *TINY, "--batch-size", "8", *two, "--cache-features", how))
    for a, b in zip(losses(tmp_path / "off"), losses(tmp_path / "auto"), strict=True):
        assert a == pytest.approx(b, rel=2e-3)


def test_views_and_mixup_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(folder), *FROZEN, "--cache-features", "2", "--mixup", "0.2"]) == 2
    assert "does not work with MixUp and CutMix" in capsys.readouterr().err
    assert main(["train", str(folder), *FROZEN, "--cache-features", "some"]) == 2
    assert "--cache-features some: must be" in capsys.readouterr().err


@pytest.mark.matrix
def test_two_processes_equal_one(folder: Path, tmp_path: Path) -> None:
    """Each process computes a part of the features and has all of them."""
    options = [folder, *FROZEN, "--aug", "none", "--global-batch-size", "8", "--seed", "3"]
    said = together(2, "train", *options, "-o", tmp_path / "two")
    assert "features before head are computed once, for validation and training" in said
    assert main(["train", *map(str, options), "-o", str(tmp_path / "one"), "--cache-features", "off"]) == 0
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
