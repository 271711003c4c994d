"""Faults of data, weights and network that the tests of single modules do not show from the outside."""

import json
import os
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from resnet_dist.cli.main import main
from resnet_dist.config.schema import ModelConfig
from resnet_dist.errors import ArtifactError
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.model.weights import load_backbone, read_tensors
from tests.conftest import TINY, make_folder, write_image

Refused = Callable[..., str]
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", "2"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "own", train=4, val=3)


# Images


def two_processes(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *LAUNCH, "-m", "resnet_dist", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


def spoil(own: Path) -> list[str]:
    (own / "train/cat/empty.jpg").write_bytes(b"")
    (own / "train/dog/text.png").write_text("hello")
    cut = own / "train/emu/train001.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    return ["train/cat/empty.jpg", "train/dog/text.png", "train/emu/train001.png"]


@pytest.mark.matrix
def test_two_processes_skip_the_same_images(own: Path, tmp_path: Path) -> None:
    """They train on as many images as each other and as one process, and one of them lists what was left out."""
    bad = spoil(own)
    options = [*TINY, "--epochs", "1", "-b", "3", "--check", "full", "--bad-images", "skip", "--max-bad-share", "0.5"]
    done = two_processes("train", own, *options, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("WARNING: 3 unusable images left out") == 1
    assert main(["train", str(own), *options, "-o", str(tmp_path / "one")]) == 0
    for run in ("one", "two"):
        listed = (tmp_path / run / "bad_images.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in listed] == bad
    manifests = [(tmp_path / run / "data/manifest.csv").read_bytes() for run in ("one", "two")]
    assert manifests[0] == manifests[1] and manifests[0].count(b"\n") == 1 + 12 + 9 - 1
    images = [json.loads((tmp_path / run / "run.json").read_text())["images"] for run in ("one", "two")]
    assert images[0] == images[1] == {"train": 11, "val": 9, "test": 0}


@pytest.mark.matrix
def test_two_processes_refuse_them_in_one_line(own: Path, tmp_path: Path) -> None:
    spoil(own)
    done = two_processes("train", own, *TINY, "-o", tmp_path / "run")
    said = [line for line in done.stderr.splitlines() if line.startswith("resnet-dist")]
    assert done.returncode != 0 and len(said) == 1 and "2 images cannot be used" in said[0]
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_class_whose_images_are_all_unusable_is_named(own: Path, tmp_path: Path, refused: Refused) -> None:
    for file in (own / "train/emu").iterdir():
        file.write_bytes(b"")
    options = ["--bad-images", "skip", "--max-bad-share", "1", "-o", tmp_path / "run"]
    assert "class 'emu' has no usable training image" in refused(3, "train", own, *TINY, *options)


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "link to a pipe"])
def test_a_pipe_or_dangling_link_does_not_block_check(own: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe is not an image. A link is one, and if its target is missing, that is reported."""
    file = own / "train/cat/x.jpg"
    if kind == "dangling link":
        file.symlink_to("nowhere.jpg")
    else:
        os.mkfifo(file if kind == "pipe" else own / "pipe")
        if kind == "link to a pipe":
            file.symlink_to(own / "pipe")
    code = main(["check", str(own), "--no-cache"])
    said = capsys.readouterr().out
    if kind == "pipe":
        assert code == 0 and "ignored (files that are not read as images: 1 .jpg)" in said
    else:
        assert code == 3 and "train/cat/x.jpg: " in said


def test_huge_file_is_not_an_image(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the header of a sound one: reading the rest would fill the memory."""
    with (own / "train/cat/train000.png").open("r+b") as stream:
        stream.truncate(1 << 40)
    assert main(["check", str(own), "--no-cache"]) == 3
    assert "train/cat/train000.png: larger than 512 MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("\u00e9mu", unicodedata.normalize("NFD", "\u00e9mu"))], ids=["case", "NFD"]
)
def test_folders_whose_names_look_the_same_are_a_warning(
    tmp_path: Path, names: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(8):
        write_image(tmp_path / names[i % 2] / f"{i}.png", seed=i)
    assert main(["train", str(tmp_path), *TINY, "--dry-run"]) == 0
    assert "differ only in case, in spaces or in the encoding of letters" in capsys.readouterr().out


def test_manifest_without_a_line_end_is_not_read_whole(tmp_path: Path, refused: Refused) -> None:
    with (tmp_path / "m.csv").open("wb") as stream:
        stream.truncate(1 << 36)
    assert "a line of more than" in refused(3, "train", tmp_path / "m.csv", *TINY)


# Weights


def tensors_of(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    made = build(Architecture.of(ModelConfig(model="resnet18"), 2)).state_dict()
    return {**made, "layer1.0.conv1.weight": change(made["layer1.0.conv1.weight"])}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t / 0, "layer1.0.conv1.weight contains values that are not finite"),
        (lambda t: t.to(torch.int8), "layer1.0.conv1.weight holds whole numbers instead of real numbers"),
        (lambda t: t.to(torch.complex64), "another kind of tensor"),
        (lambda t: t.to_sparse(), "another kind of tensor"),
    ],
    ids=["not finite", "whole numbers", "complex", "sparse"],
)
def test_weights_that_would_be_converted_in_silence_are_refused(change: Any, said: str) -> None:
    made = Architecture.of(ModelConfig(model="resnet18"), 2)
    with pytest.raises(ArtifactError, match=said):
        load_backbone(build(made), tensors_of(change), made, "w.pth")


def test_half_precision_weights_are_taken() -> None:
    made = Architecture.of(ModelConfig(model="resnet18"), 2)
    model, given = build(made), tensors_of(lambda tensor: tensor.half())
    load_backbone(model, given, made, "w.pth")
    name = "layer1.0.conv1.weight"
    assert torch.equal(model.state_dict()[name], given[name].float())


def test_huge_and_packed_weights_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """A hole of a terabyte, and an archive whose parts say that they unpack to it."""
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with (tmp_path / "w.safetensors").open("r+b") as stream:
        stream.truncate(1 << 40)
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x")
    packed = bytearray((tmp_path / "w.pth").read_bytes())
    place = packed.index(b"PK\x01\x02") + 24  # the unpacked size in the directory at the end
    packed[place : place + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    (tmp_path / "one.pth").write_bytes(packed)
    with pytest.raises(ArtifactError, match="larger than 4 GiB"):
        read_tensors(tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match=r"one\.pth"):
        read_tensors(tmp_path / "one.pth")


# The network


def test_without_network_train_names_the_ways_out(
    own: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    machine = ["--workers", "0", "--threads", "1", "--mixed-precision", "no", "-o", tmp_path / "run"]
    said = refused(4, "train", own, "--model", "resnet18", *machine)
    assert said.count("\n") == 1 and "cannot download https://" in said and "--weights none" in said
    assert json.loads((tmp_path / "run/run.json").read_text())["exit_code"] == 4
