"""`--init-from`: a new run from the weights of an old one, and what it knows of itself."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_dist.cli import compare as command
from resnet_dist.cli.main import main
from resnet_dist.cli.parser import parse
from resnet_dist.config.schema import TrainConfig
from resnet_dist.config.stored import kept
from resnet_dist.errors import UsageError
from resnet_dist.model.checkpoint import save_best, start_from
from resnet_dist.model.start import StartingPoint
from resnet_dist.runtime.accelerate import start
from resnet_dist.training import comparison
from resnet_dist.training.job import Job
from resnet_dist.training.resume import Resumed, changes
from resnet_dist.training.state import Best, State
from tests.conftest import TINY, make_folder
from tests.training.helpers import config_of, job_of

Refused = Callable[..., str]
BEST = "checkpoints/best.safetensors"
MACHINE = ["--workers", "0", "--threads", "1", "--mixed-precision", "no"]


@pytest.fixture(scope="module")
def old(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with a head, a stem and a preprocessing that are not the defaults."""
    path = tmp_path_factory.mktemp("old") / "run"
    options = ["--head", "mlp", "--head-hidden", "7", "--resize-mode", "squash", "--mean", "0.4,0.5,0.6"]
    assert main(["train", str(folder), *TINY, *options, "--epochs", "1", "-o", str(path)]) == 0
    return path


def started(old: Path, data: Path, out: Path, *options: str) -> Job:
    """A run from old weights, before its first step."""
    return job_of(out, data, "--init-from", old, *MACHINE, *options)


def weights_of(job: Job) -> dict[str, torch.Tensor]:
    return job.model.state_dict()


def said_of(job: Job, old: Path) -> str:
    """What is said of the weights when the run starts."""
    return start_from(old / BEST, job.model, job.plan.architecture, job.plan.index.classes)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, head: bool) -> bool:
    """Whether the weights, with or without those of the head, are the same bits."""
    names = [name for name in a if "num_batches" not in name and name.startswith("fc.") == head]
    return bool(names) and all(torch.equal(a[name], b[name]) for name in names)


@pytest.mark.parametrize("inside", ["", BEST])
def test_same_classes_bring_backbone_head_and_preprocessing(
    old: Path, folder: Path, tmp_path: Path, inside: str
) -> None:
    """Of a run folder and of a checkpoint; neither network nor image size is said again."""
    job, before = started(old / inside, folder, tmp_path / "new"), load_file(old / BEST)
    assert weights_of(job).keys() == before.keys()
    assert equal(weights_of(job), before, head=False) and equal(weights_of(job), before, head=True)
    assert said_of(job, old) == f"weights: backbone and head of {old / BEST}"
    assert job.plan.spec.to_dict() == json.loads((old / "preprocess.json").read_text())
    assert (job.plan.spec.img_size, job.plan.spec.resize_mode, job.plan.spec.mean) == (16, "squash", (0.4, 0.5, 0.6))


def test_other_classes_bring_the_backbone_and_a_new_head(old: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", train=3, val=2, classes=("dog", "emu", "fox", "gnu"))
    job = started(old, data, tmp_path / "new")
    assert equal(weights_of(job), load_file(old / BEST), head=False)
    assert weights_of(job)["fc.3.weight"].shape == (4, 7)
    assert said_of(job, old).endswith("new head (2 of its 3 classes are also here)")


def test_as_many_other_classes_do_not_bring_the_head(old: Path, tmp_path: Path) -> None:
    """Of equal shape, but it would name the wrong things."""
    data = make_folder(tmp_path / "data", train=3, val=2, classes=("cat", "dog", "fox"))
    assert not equal(weights_of(started(old, data, tmp_path / "new")), load_file(old / BEST), head=True)


def test_another_head_is_new_and_given_options_apply(old: Path, folder: Path, tmp_path: Path) -> None:
    job = started(old, folder, tmp_path / "new", "--head", "linear", "--resize-mode", "pad", "--img-size", "24")
    assert equal(weights_of(job), load_file(old / BEST), head=False)
    assert weights_of(job)["fc.weight"].shape == (3, 512)
    assert said_of(job, old).endswith("new head (it had mlp 7, this run has linear)")
    assert (job.plan.spec.img_size, job.plan.spec.resize_mode, job.plan.spec.mean) == (24, "pad", (0.4, 0.5, 0.6))


def test_run_that_starts_from_another_run_can_be_repeated(
    old: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.toml names the old run; the checkpoint, which travels, names no path."""
    command = ["train", str(folder), "--init-from", str(old), *MACHINE, "--epochs", "1", "-o", str(tmp_path / "one")]
    assert main(command) == 0
    assert f"weights: backbone and head of {old / BEST}" in capsys.readouterr().out
    assert main(["train", "-c", str(tmp_path / "one/config.toml"), "-o", str(tmp_path / "two")]) == 0
    assert (tmp_path / "one" / BEST).read_bytes() == (tmp_path / "two" / BEST).read_bytes()
    assert str(old).encode() not in (tmp_path / "one" / BEST).read_bytes()
    # Resumed, it goes on with its own random stream; runs of versions before there were several had the first.
    stored = tmp_path / "one/config.toml"
    assert parse(TrainConfig, ["--resume", str(tmp_path / "one")], "train").run.random_stream == 1
    stored.write_text(stored.read_text().replace("random_stream = 1\n", ""))
    assert parse(TrainConfig, ["--resume", str(tmp_path / "one")], "train").run.random_stream == 0


def test_run_of_an_older_version_goes_on_with_the_first_stream(old: Path, folder: Path) -> None:
    """Its state names no random stream; another one than the first would be another run."""
    cfg = config_of(folder, "--init-from", old, *MACHINE)
    then = kept(cfg)
    assert "random_stream" not in then["run"]
    resumed = Resumed(State(), {}, {"config": then, "data": {}, "global_batch": 8})
    for stream in (0, 1):
        now = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, random_stream=stream))
        if stream == 0:
            assert changes(Path("run"), resumed, now, {}, 8) == []
        else:
            with pytest.raises(UsageError, match="but --random-stream 0 -> 1"):
                changes(Path("run"), resumed, now, {}, 8)


@pytest.mark.parametrize(("stored", "typed", "stream"), [("", [], 0), ("random_stream = 3\n", [], 3), ("", ["4"], 4)])
def test_comparison_goes_on_with_the_stream_of_the_run(
    old: Path, folder: Path, tmp_path: Path, stored: str, typed: list[str], stream: int
) -> None:
    """The first, if an older version began the run; a run that is not begun yet has none so far."""
    options = ["--recipes", "bn-only", "--init-from", str(old), *MACHINE]
    options += [part for value in typed for part in ("--random-stream", value)]
    (cfg,) = command.read([str(folder), *options])
    accelerator, _ = start(cfg.system)
    single = comparison.training(cfg, 0, tmp_path)
    assert comparison.as_begun(accelerator, single) == single
    run = tmp_path / "bn-only/seed-0"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(f'[run]\ninit_from = "{old}"\n{stored}')
    assert comparison.as_begun(accelerator, single).run.random_stream == stream


def samples_of(job: Job) -> list[tuple[int, list[int]]]:
    """Position and first pixels of every sample of the first epoch, in order."""
    batches = [batch for step in job.train_loader.epoch(0) for batch in step]
    return [(int(i), image.flatten().tolist()) for b in batches for i, image in zip(b.index, b.images, strict=True)]


def test_it_is_fine_tuned_and_does_not_repeat_the_samples(old: Path, folder: Path, tmp_path: Path) -> None:
    """Of the run before it or of the one before that; unless it is asked for."""
    first = started(old, folder, tmp_path / "first")
    assert first.plan.optimizer.lr == 1e-3 and first.plan.cfg.run.random_stream == 1
    save_best(tmp_path / "first.safetensors", first.model, first.plan.description(Best({}, 1, "raw")))
    second = started(tmp_path / "first.safetensors", folder, tmp_path / "second")
    again = started(old, folder, tmp_path / "again", "--random-stream", "0")
    scratch = job_of(tmp_path / "scratch", folder, *TINY, "--resize-mode", "squash", "--mean", "0.4,0.5,0.6")
    runs = [samples_of(job) for job in (scratch, first, second)]
    for a in range(3):
        for b in range(a):
            assert [i for i, _ in runs[a]] != [i for i, _ in runs[b]]
            same = sum(image in [other for _, other in runs[b]] for _, image in runs[a])
            assert same == 0
    assert samples_of(again) == runs[0]


@pytest.mark.parametrize(
    ("weights", "init_from", "pretrained", "words"),
    [
        ("none", None, False, "random weights"),
        ("DEFAULT", None, True, "torchvision's DEFAULT"),
        ("IMAGENET1K_V2", None, True, "torchvision's IMAGENET1K_V2"),
        ("my.pth", None, True, "my.pth"),
        ("none", "runs/a", True, "the run runs/a"),
    ],
)
def test_starting_point_is_one_value(weights: str, init_from: str | None, pretrained: bool, words: str) -> None:
    start = StartingPoint.of(weights, init_from)
    assert (start.pretrained, str(start)) == (pretrained, words)
    assert start.file == (Path(init_from or weights) if start.kind in ("file", "run") else None)


def test_another_architecture_is_refused(old: Path, folder: Path, tmp_path: Path, refused: Refused) -> None:
    said = refused(6, "train", folder, "--init-from", old, *MACHINE, "--model", "resnet34", "-o", tmp_path / "x")
    assert "does not fit resnet34" in said and "it fits --model resnet18 --stem small" in said


def test_resumed_run_keeps_where_it_started(old: Path, refused: Refused) -> None:
    said = refused(2, "train", "--resume", old, "--init-from", old, "--epochs", "2")
    assert f"--init-from automatic -> {old}" in said


def test_options_that_contradict_init_from_are_refused(old: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.toml"
    file.write_text('[model]\nweights = "IMAGENET1K_V1"\n')
    for typed in (["--weights", "none"], ["--weights", "w.pth"], ["-c", str(file), "--stem", "standard"]):
        with pytest.raises(UsageError, match=r"both set the initial weights: give one of them"):
            parse(TrainConfig, [str(folder), "--init-from", str(old), *typed], "train")


def test_a_file_that_is_not_a_checkpoint_is_refused(old: Path, folder: Path, tmp_path: Path, refused: Refused) -> None:
    """Nothing, a run without one, weights from elsewhere, a truncated one: exit code 6 and one line."""
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((old / BEST).read_bytes()[:-9])
    shutil.copytree(old, tmp_path / "empty", ignore=shutil.ignore_patterns("best.safetensors"))
    for name, word in (
        ("nothing", "cannot be read"),
        ("empty", "cannot be read"),
        ("foreign.safetensors", "with --weights"),
        ("cut.safetensors", "not a safetensors file"),
    ):
        said = refused(6, "train", folder, "--init-from", tmp_path / name, *MACHINE, "-o", tmp_path / "x")
        assert word in said and name in said and said.count("\n") == 1
