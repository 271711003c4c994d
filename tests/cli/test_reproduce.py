"""Provenance in run.json, and `resnet-dist reproduce` from it."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch

from resnet_dist.cli.main import main
from resnet_dist.runtime.machine import git_state, peak_memory
from tests.conftest import TINY, make_folder

Refused = Callable[..., str]
SHORT = [*TINY, "--epochs", "1", "--batch-size", "8", "--lr", "0.02", "--recipe", "bn-only"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed by a test."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", str(data), *SHORT, "-o", str(path)]) == 0
    return path


def facts_of(run: Path) -> dict[str, object]:
    facts: dict[str, object] = json.loads((run / "run.json").read_text())
    return facts


def test_run_json_says_with_what_it_was_made(run: Path, data: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    (launch,) = facts["launches"]
    assert launch["versions"]["torch"] == version("torch") and launch["versions"]["pillow"] == version("pillow")
    assert (launch["processes"], launch["threads"], launch["precision"], launch["device"]) == (1, 1, "no", "cpu")
    assert launch["hardware"]["cores"] == len(os.sched_getaffinity(0)) and launch["hardware"]["cpu"]
    assert facts["seed"] == 0 and facts["global_batch"] == 8 and facts["seconds"] > 0
    images = list(data.rglob("*.png"))
    assert facts["data"]["images"] == len(images)
    assert facts["data"]["bytes"] == sum(file.stat().st_size for file in images)


def test_run_json_contains_no_environment_variable(run: Path) -> None:
    text = (run / "run.json").read_text()
    assert os.uname().nodename not in text
    assert "PATH" not in text and os.environ["PATH"] not in text and "HOME" not in text


def test_peak_memory_is_what_the_process_held() -> None:
    block = torch.ones(200 << 18)  # 200 MiB
    assert peak_memory()["host_mib"] >= psutil.Process().memory_info().rss >> 20
    with_block = peak_memory()["host_mib"]
    del block
    assert peak_memory()["host_mib"] >= with_block - 1, "it is the most, not the present"


def test_git_state_is_that_of_the_working_directory(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_reproduced_run_is_byte_identical(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new = tmp_path / "new"
    assert main(["reproduce", str(run), "-o", str(new)]) == 0
    said = capsys.readouterr().out
    assert "best.safetensors: the same bytes" in said and "possible cause" not in said
    best = "checkpoints/best.safetensors"
    assert (new / best).read_bytes() == (run / best).read_bytes()
    assert json.loads((new / "reproduction.json").read_text())["same_bytes"] is True
    # Once more only compares; as if the first had been made with another torch, and scored otherwise.
    other = shutil.copytree(run, tmp_path / "other")
    facts = json.loads((other / "run.json").read_text())
    facts["launches"][-1]["versions"]["torch"] = "1.0"
    facts["best"]["top1"] -= 0.004
    (other / "run.json").write_text(json.dumps(facts))
    with (other / best).open("ab") as stream:
        stream.write(b" ")
    assert main(["reproduce", str(other), "-o", str(new)]) == 0
    said = capsys.readouterr().out
    assert "other bytes" in said and f"possible cause: versions torch 1.0 -> {version('torch')}" in said
    assert "+0.004000" in said
    assert main(["reproduce", str(other), "-o", str(new), "--tolerance", "0.001"]) == 6
    assert "differ by up to 0.0040, more than --tolerance 0.001" in capsys.readouterr().err


def test_other_data_is_refused(run: Path, data: Path, tmp_path: Path, refused: Refused) -> None:
    """A file that grew, one that is gone, and one that changed its class."""
    image = data / "train/cat/train000.png"
    before = image.read_bytes()
    try:
        image.write_bytes(before + b"x")
        assert "has changed since (bytes " in refused(3, "reproduce", run, "-o", tmp_path / "a")
        image.rename(tmp_path / "away.png")
        assert "images 39 -> 38" in refused(3, "reproduce", run, "-o", tmp_path / "a")
        (data / "train/dog/other.png").write_bytes(before)
        assert "other paths, classes or splits" in refused(3, "reproduce", run, "-o", tmp_path / "a")
    finally:
        image.write_bytes(before)
        (data / "train/dog/other.png").unlink(missing_ok=True)
    assert not (tmp_path / "a").exists()


def test_runs_that_cannot_be_reproduced(run: Path, tmp_path: Path, refused: Refused) -> None:
    assert "not a run folder" in refused(2, "reproduce", tmp_path / "none")
    assert "that is the run itself" in refused(2, "reproduce", run, "-o", run)
    assert "RUN is missing" in refused(2, "reproduce")
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "run.json").write_text(json.dumps({**facts_of(run), "status": "failed"}))
    assert "not done (status failed)" in refused(2, "reproduce", broken)


def test_every_start_is_recorded(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    assert main(["train", "--resume", str(copy), "--epochs", "2"]) == 0
    launches = json.loads((copy / "run.json").read_text())["launches"]
    assert len(launches) == 2 and launches[0] == json.loads((run / "run.json").read_text())["launches"][0]
