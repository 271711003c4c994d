"""Bad input: one line that names the file or flag and the way out, the documented exit code, and nothing lost."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import TINY, make_folder, write_image

Refused = Callable[..., str]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A small folder that a test may change."""
    return make_folder(tmp_path / "own", train=3, val=2)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_no_such_folder(refused: Refused, tmp_path: Path) -> None:
    assert lines(refused(3, "train", tmp_path / "nowhere", *TINY)) == [
        f"resnet-dist train: error: {tmp_path / 'nowhere'}: there is no such folder or manifest"
    ]


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ([], "phase 1 BatchNorm layer4.0.bn1"),
        (["--head", "concat-pool"], "phase 1 BatchNorm fc.1"),
        (["--recipe", "head-then-all", "--phase", "1.batch_norm_stats=frozen"], "phase 2 BatchNorm layer4.0.bn1"),
    ],
)
def test_batch_too_small_for_batch_norm(refused: Refused, own: Path, options: list[str], layer: str) -> None:
    """Refused before the run folder is created; with frozen statistics one image is enough."""
    options = [*options, *([] if "--head" in options else ["--img-size", "8"])]
    said = lines(refused(2, "train", own, *TINY, "-b", "1", *options, "-o", own / "run"))
    assert len(said) == 1 and layer in said[0] and "at least 2 images per process" in said[0]
    assert not (own / "run").exists()


def test_weights_are_checked_before_training(refused: Refused, own: Path) -> None:
    """A file that is missing, damaged or of another network: exit code 6, and no run folder."""
    save_file({"conv1.weight": torch.zeros(64, 3, 3, 3)}, own / "other.safetensors")
    (own / "cut.safetensors").write_bytes((own / "other.safetensors").read_bytes()[:-9])
    for name in ("no-such.pth", "no-such.safetensors", "other.safetensors", "cut.safetensors"):
        for dry in (["--dry-run"], []):
            said = lines(refused(6, "train", own, *TINY, "--weights", own / name, *dry, "-o", own / "run"))
            assert len(said) == 1 and name in said[0] and not (own / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "meant"),
    [
        (("train", "own", "--weights", "resnte18.safetensors"), 6, "resnet18.safetensors"),
        (("train", "own", "--weights", "resnte18.pth"), 6, "resnet18.pth"),
        (("train", "--resume", "runs/fotos"), 2, "runs/photos"),
        (("eval", "runs/fotos"), 6, "runs/photos"),
        (("export", "runs/fotos"), 6, "runs/photos"),
    ],
)
def test_missing_files_and_runs_name_the_closest(
    refused: Refused, own: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, meant: str
) -> None:
    monkeypatch.chdir(own.parent)
    (own.parent / "runs" / "photos").mkdir(parents=True)
    for name in ("resnet18.safetensors", "resnet18.pth"):
        (own.parent / name).touch()
    options = TINY if arguments[:2] == ("train", "own") else []
    (said,) = lines(refused(code, arguments[0], *options, *arguments[1:]))
    assert said.endswith(f"; did you mean '{meant}'?")


def test_a_folder_that_is_no_run_says_so(refused: Refused, own: Path) -> None:
    assert refused(6, "eval", own).rstrip().endswith(f"there is no such checkpoint, because {own} is not a run folder")
    assert f"--resume {own}: not a run folder" in refused(2, "train", "--resume", own)


def test_a_recipe_that_is_a_file_names_the_option(refused: Refused, own: Path) -> None:
    assert "; a file is given with -c my.toml" in refused(2, "train", own, *TINY, "--recipe", "my.toml")


def test_no_images(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "no images found" in refused(3, "train", tmp_path, *TINY)


def test_one_class(refused: Refused, own: Path) -> None:
    for split in ("train", "val"):
        for name in ("dog", "emu"):
            shutil.rmtree(own / split / name)
    assert "at least two classes" in refused(3, "train", own, *TINY)


def test_empty_class(refused: Refused, own: Path) -> None:
    for file in (own / "train/dog").iterdir():
        file.unlink()
    said = refused(3, "train", own, *TINY)
    assert str(own / "train/dog") in said and "without images" in said


def test_class_only_in_val(refused: Refused, own: Path) -> None:
    (own / "val/yak").mkdir()
    write_image(own / "val/yak/0.png", seed=0)
    assert "val has class 'yak', which train does not have" in refused(3, "train", own, *TINY)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_file_is_named(refused: Refused, own: Path, tmp_path: Path, workers: str) -> None:
    bad = own / "train/cat/train001.png"
    bad.write_bytes(bad.read_bytes()[:200])
    said = refused(3, "train", own, *TINY, "--workers", workers, "-b", "9", "-o", tmp_path / "run")
    assert str(bad) in said and "truncated" in said and len(lines(said)) == 1


def test_missing_weights_file(refused: Refused, own: Path, tmp_path: Path) -> None:
    said = refused(6, "train", own, "--model", "resnet18", "--weights", tmp_path / "w.pth", "-o", tmp_path / "run")
    assert f"{tmp_path / 'w.pth'}: there is no such weights file" in said


def test_weights_of_another_architecture(refused: Refused, own: Path, tmp_path: Path) -> None:
    import torchvision

    save_file(torchvision.models.resnet34(num_classes=5).state_dict(), tmp_path / "w.safetensors")
    options = ["--model", "resnet18", "--weights", tmp_path / "w.safetensors", "-o", tmp_path / "run"]
    said = refused(6, "train", own, *options)
    assert "does not fit resnet18" in said and "it fits --model resnet34" in said and len(lines(said)) == 1


def test_unknown_option_and_all_others_at_once(refused: Refused, own: Path) -> None:
    said = refused(2, "train", own, "--epoch", "3", "--lr", "fast", "--dropout", "1.5", "--modle=resnet18")
    assert "'--epoch'; did you mean '--epochs'?" in said
    assert "--lr fast: must be a number" in said
    assert "--dropout 1.5" in said
    assert "'--modle'; did you mean '--model'?" in said


def test_selection_that_selects_nothing(refused: Refused, own: Path) -> None:
    said = refused(2, "train", own, *TINY, "--trainable", "layer5")
    assert "'layer5' matches nothing; use all, stem, layer1" in said


def test_read_only_run_folder(refused: Refused, own: Path, tmp_path: Path) -> None:
    """Root may write to any folder, so it gets a path where no folder can be created."""
    place = tmp_path / "closed"
    place.mkdir()
    place.chmod(0o555)
    run = (Path("/proc") if os.geteuid() == 0 else place) / "run"
    said = refused(4, "train", own, *TINY, "-o", run)
    assert f"{run}: the run folder cannot be created" in said and len(lines(said)) == 1


def test_no_disk_space(refused: Refused, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk says is faked; what is needed is not."""
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    said = refused(4, "train", own, *TINY, "-o", tmp_path / "run")
    assert "MiB free" in said and len(lines(said)) == 1


def test_output_is_a_file(refused: Refused, own: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    assert "is not a run" in refused(2, "train", own, *TINY, "-o", tmp_path / "run")
    assert (tmp_path / "run").read_text() == "precious"


def test_drop_last_with_less_than_a_batch(refused: Refused, own: Path, tmp_path: Path) -> None:
    said = refused(2, "train", own, *TINY, "-b", "64", "--drop-last", "-o", tmp_path / "run")
    assert "9 training images do not fill one global batch of 64" in said


def test_eval_refuses_folders_that_are_not_runs(refused: Refused, own: Path, tmp_path: Path) -> None:
    assert "RUN is missing" in refused(2, "eval")
    assert "there is no such checkpoint" in refused(6, "eval", tmp_path)
    write_image(tmp_path / "x.png", seed=0)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.png").read_bytes())
    said = refused(6, "eval", tmp_path / "x.safetensors", own, "-o", tmp_path / "out")
    assert "not a safetensors file" in said


def test_classes_with_control_characters_do_not_reach_the_terminal(own: Path, refused: Refused) -> None:
    (own / "val/\x1b[31mred").mkdir()
    write_image(own / "val/\x1b[31mred/0.png", seed=0)
    said = refused(3, "train", own, *TINY)
    assert "\x1b" not in said and "\\x1b[31mred" in said
