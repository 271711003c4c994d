"""--augment-on device in whole runs: where it works, what it says, and that a resumed run ends in the same bits."""

import os
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM

import pytest
import torch

from resnet_dist.cli.main import main
from resnet_dist.data.device_augment import DrawnImages
from resnet_dist.data.loader import TrainImages
from resnet_dist.runtime import environment as launcher
from tests.conftest import TINY
from tests.training.helpers import job_of
from tests.training.interrupted import interrupt
from tests.training.test_resume import outcome

ON_DEVICE = [*TINY, "--cache", "device", "--augment-on", "device"]


def test_network_gets_what_the_host_makes(folder: Path, tmp_path: Path) -> None:
    """Images that are too small to be shrunk: the same order, and pixels within a level of 255."""
    options = ["-b", "8", "--mixup", "0.4", "--crop-scale", "0.3,1"]
    jobs = [job_of(tmp_path / str(len(start)), folder, *start, *options) for start in (TINY, ON_DEVICE)]
    assert isinstance(jobs[1].train_loader.samples, DrawnImages)
    host, device = ([job.to_input(batch) for step in job.train_loader.epoch(1) for batch in step] for job in jobs)
    assert len(host) == len(device) == 3
    for one, two in zip(host, device, strict=True):
        assert float((one - two).abs().max()) < 2.1 / 255 / 0.22  # the smallest standard deviation


def test_images_that_do_not_fit_are_augmented_on_the_host(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the memory is less than the training images, but all of it is more than all images."""
    monkeypatch.setattr(launcher, "available_memory", lambda: 60_000)
    assert main(["train", str(folder), *ON_DEVICE, "--epochs", "1", "-o", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "--augment-on host for the training images, because they take more than half of a device's free" in said
    job = job_of(tmp_path / "job", folder, *ON_DEVICE, "-b", "8")
    assert isinstance(job.train_loader.samples, TrainImages)
    assert all(batch.changes is None for step in job.train_loader.epoch(0) for batch in step)


def test_without_random_changes_nothing_is_drawn(folder: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path / "run", folder, *ON_DEVICE, "--aug", "none", "-b", "8")
    assert not isinstance(job.train_loader.samples, DrawnImages)
    mixed = job_of(tmp_path / "mixed", folder, *ON_DEVICE, "--aug", "none", "--mixup", "0.2", "-b", "8")
    plain = job_of(tmp_path / "plain", folder, *TINY, "--aug", "none", "--mixup", "0.2", "-b", "8")
    inputs = [[job.to_input(batch) for (batch,) in job.train_loader.epoch(0)] for job in (mixed, plain)]
    assert all(map(torch.equal, *inputs))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cache", "ram"], "--augment-on device needs --cache device, not ram"),
        (["--aug", "trivial"], "--augment-on device does not work with --aug trivial, which changes images one by one"),
        (["--aug", "randaug"], "--augment-on device does not work with --aug randaug"),
        (["--cache-features", "3"], "--augment-on device does not work with --cache-features N"),
    ],
    ids=str,
)
def test_where_it_cannot_work_it_is_refused(
    folder: Path, options: list[str], said: str, refused: Callable[..., str]
) -> None:
    assert said in refused(2, "train", str(folder), *ON_DEVICE, *options)


def test_resumed_run_equals_the_uninterrupted_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted within an epoch, and resumed with loader processes: the same losses, best and last weights."""
    options = ["--recipe", "head-then-all", "--phase", "1.epochs=1", "--epochs", "3", "--global-batch-size", "8"]
    options += ["--ema", "--mixup", "0.4", "--color-jitter", "0.3", "--rotation", "10", "--erasing", "0.3"]
    options += ["--log-every", "1", "--save-every", "2steps"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(["train", str(folder), *ON_DEVICE, *options, "-o", str(whole)]) == 0
    assert "training images are kept and augmented on cpu, short side at most 24 pixels" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt("mid-epoch", lambda: os.kill(os.getpid(), SIGTERM), patch.setattr)
        assert main(["train", str(folder), *ON_DEVICE, *options, "-o", str(run)]) == 75
    assert main(["train", "--resume", str(run), "--workers", "2"]) == 0
    assert outcome(run) == outcome(whole)
