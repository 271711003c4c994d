"""The folder of a run that is resumed: one writer, damaged files, a full or read-only disk, other processes."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

import resnet_dist.training.loop as loop
import resnet_dist.training.resume as resume
from resnet_dist.cli.main import main
from resnet_dist.config.schema import AugmentConfig, TrainConfig
from resnet_dist.data.loader import epoch_order
from resnet_dist.training.folder import how_to_resume
from resnet_dist.training.state import newest_state, read_newest_state, write_state
from tests.conftest import TINY, small_disk
from tests.training.interrupted import interrupt, interrupted, record
from tests.training.test_kills import flip
from tests.training.test_resume import facts, launched, stopped_after

# Three steps in an epoch, a checkpoint after each.
STEPWISE = [*TINY, "--epochs", "2", "--global-batch-size", "8", "--log-every", "1", "--save-every", "1steps"]
LOCK = """
import sys
from pathlib import Path
from resnet_dist.files.run import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.lock()
"""


@pytest.mark.parametrize(
    ("started_by", "aug", "launched_by", "wanted"),
    [
        ("resnet-dist train photos", "basic", None, "`resnet-dist train --resume 'a b'`"),
        ("resnet-dist demo", "basic", None, "`resnet-dist train --resume 'a b'`"),
        ("resnet-dist train photos", "basic", "2", "`train --resume 'a b'` under the same launcher"),
        ("resnet-dist compare photos --seeds 2", "basic", None, "`resnet-dist compare photos --seeds 2`"),
        ("resnet_dist.train(data='photos')", "basic", None, "`resnet_dist.train(resume='a b')`"),
        ("resnet_dist.train()", "custom", None, "`resnet_dist.train(resume='a b', train_transform=...)`"),
    ],
)
def test_the_command_that_continues_a_run(
    monkeypatch: pytest.MonkeyPatch,
    started_by: str,
    aug: Literal["basic", "custom"],
    launched_by: str | None,
    wanted: str,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if launched_by is not None:
        monkeypatch.setenv("WORLD_SIZE", launched_by)
    cfg = dataclasses.replace(TrainConfig(), augment=AugmentConfig(aug=aug))
    assert how_to_resume(started_by, Path("a b"), cfg) == wanted


@pytest.fixture(scope="module")
def stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was told to stop after its fourth step of six; not to be changed by a test."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop = interrupted(loop.train_step, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(loop, "train_step", stop)
        assert main(["train", str(folder), *STEPWISE, "-o", str(run)]) == 75
    assert stopped_after(run) == 4
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def contents(run: Path) -> dict[Path, tuple[int, int]]:
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in run.rglob("*")}


# One writer


@pytest.fixture
def other(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes the run; a child of it lives on when it is killed, as a loader process may."""
    script = f"{LOCK}\nimport os, time\nif os.fork():\n    print('locked', flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", script, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_run_that_another_process_writes_is_refused(
    run: Path, other: subprocess.Popen[str], folder: Path, refused: Callable[..., str]
) -> None:
    """Whether it is to go on or to be replaced; once the writer is killed it is free, whoever lives on."""
    before = contents(run)
    for arguments in (["--resume", run], [folder, "-o", run, "--resume", "auto"], [folder, "-o", run, "--overwrite"]):
        said = refused(2, "train", *arguments)
        assert said.startswith(f"resnet-dist train: error: {run}: another process is writing this run; ")
        assert said.count("\n") == 1
    assert contents(run) == before
    other.kill()
    other.wait()
    subprocess.run([sys.executable, "-c", LOCK, str(run)], check=True)


def test_training_holds_the_lock(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step to the last, and no longer."""
    run, tries = tmp_path / "run", []

    def try_to_lock() -> None:
        tries.append(subprocess.run([sys.executable, "-c", LOCK, str(run)], capture_output=True, text=True))

    monkeypatch.setattr(loop, "train_step", interrupted(loop.train_step, 1, try_to_lock))
    monkeypatch.setattr(loop, "end_phase", interrupted(loop.end_phase, 1, try_to_lock))
    assert main(["train", str(folder), *STEPWISE, "--epochs", "1", "--save-every", "1epochs", "-o", str(run)]) == 0
    assert [("another process is writing this run" in done.stderr) for done in tries] == [True, True]
    try_to_lock()
    assert tries[-1].returncode == 0


# Damaged files


def test_damaged_checkpoint_is_skipped_with_a_message(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state before it, from before the validation of the first epoch, makes the same of the run.

    Lines of the metrics files that were cut off, and what a killed writer left, are gone.
    """
    twin = tmp_path / "twin"
    shutil.copytree(run, twin)
    newest = newest_state(run / "checkpoints")
    assert newest is not None
    flip(newest / "state.safetensors")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "epo')
    with (run / "metrics.csv").open("a") as stream:
        stream.write("1,1,3,0.1")
    (run / ".tmp-7-run.json").write_text("{")
    (run / "checkpoints/.tmp-7").mkdir()
    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert (
        f"WARNING: {newest}: passed over, it does not verify (state.safetensors is not what its manifest says)" in said
    )
    assert "after 3 optimizer steps" in said
    assert main(["train", "--resume", str(twin)]) == 0
    for name in ("metrics.jsonl", "checkpoints/best.safetensors", "checkpoints/step-000000006/state.safetensors"):
        assert (run / name).read_bytes() == (twin / name).read_bytes(), name
    assert [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()] == ["epoch", "1", "2"]
    assert not list(run.rglob(".tmp-*"))


# Disks


def test_full_disk_while_training(
    folder: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full from the second checkpoint on: exit 4, the first is whole; with room again the run goes on to its end."""
    with small_disk(tmp_path / "disk", "600m") as disk:
        run, filler = disk / "run", disk / "filler"

        def fill() -> None:
            with filler.open("wb") as stream:
                try:
                    while True:
                        stream.write(bytes(1 << 20))
                        stream.flush()
                except OSError:
                    os.ftruncate(stream.fileno(), stream.tell() - (4 << 20))  # room for a log, not for a checkpoint

        with monkeypatch.context() as patch:
            patch.setattr(resume, "write_state", interrupted(write_state, 1, fill))
            said = refused(4, "train", folder, *STEPWISE, "--keep-last", "1", "-o", run)
        assert (
            "step-000000002: the checkpoint cannot be written (No space left on device); older ones are intact" in said
        )
        assert (facts(run)["status"], facts(run)["exit_code"]) == ("failed", 4)
        assert read_newest_state(run / "checkpoints")[1]["state"]["steps_done"] == 1
        filler.unlink()
        assert main(["train", "--resume", str(run)]) == 0
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5, 6]


def test_disk_that_is_too_small_is_reported_before_training(
    folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    with small_disk(tmp_path / "disk", "50m") as disk:
        said = refused(4, "train", folder, *STEPWISE, "-o", disk / "run")
        assert "MiB, the disk has only 5" in said
        assert not (disk / "run/run.json").exists()


def test_read_only_run_folder(stopped: Path, tmp_path: Path, folder: Path, refused: Callable[..., str]) -> None:
    """Said before any image is looked at."""
    run = tmp_path / "disk/run"
    with small_disk(tmp_path / "disk", "600m") as disk:
        shutil.copytree(stopped, run)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for arguments in (["--resume", run, "--data", "nowhere"], ["nowhere", "-o", disk / "new"]):
            said = refused(4, "train", *arguments)
            assert str(disk) in said and "nowhere" not in said and said.count("\n") == 1


# Another number of processes


def test_batch_size_follows_the_number_of_processes(
    run: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that two processes began, as far as its files say, goes on in one; a typed batch size is not changed."""
    config = (run / "config.toml").read_text()
    assert "\nbatch_size = 8\n" in config and "\nglobal_batch_size = 8\n" in config
    (run / "config.toml").write_text(config.replace("\nbatch_size = 8\n", "\nbatch_size = 4\n"))
    state = newest_state(run / "checkpoints")
    assert state is not None
    tensors, saved, _ = read_newest_state(run / "checkpoints")
    saved["config"]["data"]["batch_size"] = 4
    shutil.rmtree(state)
    write_state(run / "checkpoints", tensors, saved, keep=2)
    said = refused(2, "train", "--resume", run, "--batch-size", "4")
    assert "a resumed run keeps its settings, but global batch 8 -> 4" in said
    assert "--global-batch-size 8: not a multiple of 3" in refused(2, "train", "--resume", run, "--grad-accum", "3")
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--grad-accum", "2", "--dry-run"]) == 0
    assert "global batch 8 = 4 per process x 1 process x 2 accumulated" in capsys.readouterr().out
    assert main(["train", "--resume", str(run)]) == 0
    assert "changed: --batch-size 4 -> 8" in capsys.readouterr().out


@pytest.mark.matrix
def test_two_processes_then_one_then_two_read_the_same_samples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of six epochs, by what the processes read, is the step that the order of the epoch says."""
    run = tmp_path / "run"
    places = [tmp_path / name for name in ("a", "b", "c")]
    for place in places:
        place.mkdir()
    arguments = ["train", folder, *STEPWISE, "--epochs", "6", "-o", run]
    fault = ["mid-epoch", int(signal.SIGTERM), 1]
    assert launched(2, *fault, *arguments, module="tests.training.interrupted", RECORD=str(places[0])) == [75, 75]
    stops = [stopped_after(run)]
    with monkeypatch.context() as patch:
        record(places[1] / "0.jsonl", patch.setattr)
        interrupt("mid-epoch", lambda: os.kill(os.getpid(), signal.SIGTERM), patch.setattr)
        assert main(["train", "--resume", str(run)]) == 75
    stops.append(stopped_after(run))
    nobody = ["start", int(signal.SIGTERM), "none"]
    again = [*nobody, "train", "--resume", run]
    assert launched(2, *again, module="tests.training.interrupted", RECORD=str(places[2])) == [0, 0]
    assert 5 <= stops[0] < stops[1] < 18
    found = []
    for place, steps in zip(places, (stops[0], stops[1] - stops[0], 18 - stops[1]), strict=True):
        batches = [
            [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(place.glob("*.jsonl"))
        ]
        batches = [part[:steps] for part in batches]
        found += [list(itertools.chain(*step)) for step in zip(*batches, strict=True)]
    expected = [
        [[epoch, int(index)] for index in step]
        for epoch in range(6)
        for step in epoch_order(24, 0, epoch, 8, drop_last=False).reshape(3, 8)
    ]
    assert found == expected
