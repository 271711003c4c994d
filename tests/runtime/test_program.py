"""The program under the real launchers, as a user starts it."""

import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from resnet_dist.cli.main import main
from resnet_dist.config.schema import SystemConfig
from resnet_dist.errors import UsageError
from resnet_dist.model.batch_norm import choose_sync_bn
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import check_launch, choose_precision, choose_threads, start
from tests.conftest import TINY, WITH_REPORT

ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", "2"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def program(launch: list[str], *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launch, "-m", "resnet_dist", *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes under accelerate launch, BatchNorm learning, an average kept, TensorBoard written."""
    path = tmp_path_factory.mktemp("two") / "run"
    options = [*WITH_REPORT, "-b", "6", "--epochs", "2", "--ema", "--tracker", "tensorboard", "--save-every", "1steps"]
    options += ["--keep-last", "9", "--log-every", "1", "--lr", "0.02", "-o", str(path)]
    options[options.index("--threads") : options.index("--threads") + 2] = []
    done = program(ACCELERATE, "train", folder, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    first = done.stdout.splitlines()[0]
    assert first.startswith("2 processes on cpu, gloo; precision float32")
    share = max(1, launcher.cores() // 2)
    assert f"{share} thread" in first and f"{launcher.cores()} cores / 2 processes here" in first
    assert done.stdout.count("epoch 1/2") == 1, "only the main process speaks"
    return path


def test_best_checkpoint_is_a_plain_one(run: Path) -> None:
    tensors = load_file(run / "checkpoints/best.safetensors")
    assert not [name for name in tensors if name.startswith(("module.", "_orig_mod."))]
    plain = torchvision.models.resnet18(num_classes=3)
    plain.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    plain.load_state_dict(tensors)


def test_every_validation_image_is_in_the_predictions_once(run: Path, folder: Path) -> None:
    with (run / "eval/val/predictions.csv").open(newline="") as stream:
        paths = [row["path"] for row in csv.DictReader(stream)]
    assert sorted(paths) == sorted(str(f.relative_to(folder)) for f in (folder / "val").rglob("*.png"))


def test_tensorboard_holds_what_metrics_jsonl_holds(run: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = next(file.parent for file in (run / "tracker").rglob("events.out.tfevents.*"))
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    assert written == pytest.approx({row["step"]: row["loss"] for row in steps}, rel=1e-6)
    assert len(events.Scalars("val/top1")) == len(events.Scalars("ema/top1")) == 2


@pytest.mark.matrix
def test_eval_in_two_processes_equals_one(run: Path, tmp_path: Path) -> None:
    done = program(TORCHRUN, "eval", run, "-o", tmp_path / "two", "--batch-size", "4", "--threads", "1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert main(["eval", str(run), "-o", str(tmp_path / "one"), "--batch-size", "4", "--threads", "1"]) == 0
    columns = ("path", "target", "prediction", "top2", "top3")
    tables = []
    for name in ("one", "two"):
        with (tmp_path / name / "predictions.csv").open(newline="") as stream:
            tables.append([[row[column] for column in columns] for row in csv.DictReader(stream)])
    assert tables[0] == tables[1]


@pytest.mark.matrix
def test_bf16_gradients_change_little(folder: Path, tmp_path: Path) -> None:
    options = [*TINY, "-b", "6", "--epochs", "1", "--log-every", "1", "--lr", "0.01", "--batch-norm-stats", "frozen"]
    done = program(TORCHRUN, "train", folder, *options, "--ddp-comm-hook", "bf16", "-o", tmp_path / "bf16")
    assert done.returncode == 0, done.stderr[-4000:]
    assert main(["train", str(folder), *options, "-b", "12", "-o", str(tmp_path / "plain")]) == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5) and losses[0] != losses[1]


def test_an_error_on_two_processes_is_one_line(folder: Path, tmp_path: Path) -> None:
    """The main process prints it, whichever process found it, and no process keeps waiting."""
    done = program(TORCHRUN, "train", tmp_path / "nowhere", *TINY)
    said = [line for line in done.stderr.splitlines() if line.startswith("resnet-dist")]
    assert done.returncode == 1 and len(said) == 1 and "there is no such folder" in said[0]


def test_two_mains_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"started 2 processes, but this one sees 1.*--num_processes 2"):
        check_launch(1)


@pytest.mark.parametrize(
    ("environment", "asked", "threads", "why"),
    [
        ({}, 3, 3, "--threads"),
        ({"OMP_NUM_THREADS": "5"}, None, 5, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "1"}, None, 1, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, None, 4, "instead of OMP_NUM_THREADS=1"),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, None, 8, "instead of OMP_NUM_THREADS=1"),
        ({"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}, 1, 1, "--threads"),
        ({"OMP_NUM_THREADS": "3", "WORLD_SIZE": "2"}, None, 3, "OMP_NUM_THREADS"),
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: int | None, threads: int, why: str
) -> None:
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "cores", lambda: 8)
    found, reason = choose_threads(asked)
    assert found == threads and why in reason


FAULTS = """
import resource, sys, torch
from resnet_dist.config.schema import SystemConfig
from resnet_dist.runtime.accelerate import start

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24), torch.ones(1 << 22)  # 64 and 16 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

start(SystemConfig(threads=1, keep_memory=sys.argv[1]))
pages()
print(pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator that is told to")
def test_freed_memory_is_kept() -> None:
    """Of the 204,800 pages of ten pairs of tensors, one after the other, few are new; not so where it is unwanted."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", FAULTS]
    kept, given_back = (
        int(subprocess.run([*command, word], capture_output=True, text=True, env=environment, check=True).stdout)
        for word in ("on", "off")
    )
    assert kept < 10_000
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not (huge_pages.exists() and "[always]" in huge_pages.read_text()):  # one fault for 512 pages
        assert given_back > 100_000


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed, then the launcher's, then what the CPU has; fp16 on a CPU is refused."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(launcher, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert choose_precision("auto", on_cpu=True)[0] == "bf16"
    monkeypatch.setattr(launcher, "cpu_flags", lambda: frozenset())
    assert choose_precision("auto", on_cpu=True)[0] == "no"
    assert choose_precision("bf16", on_cpu=True)[0] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_precision("auto", on_cpu=True) == ("bf16", "set by accelerate launch; --mixed-precision overrides it")
    assert choose_precision("no", on_cpu=True)[0] == "no"
    with pytest.raises(UsageError, match=r"fp16 .* needs a GPU"):
        choose_precision("fp16", on_cpu=True)


def test_sync_bn_is_refused_where_it_cannot_work() -> None:
    accelerator, _ = start(SystemConfig(mixed_precision="no", threads=1))
    if accelerator.device.type == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="on GPUs only"):
        choose_sync_bn("on", accelerator, batch_norm_trains=True, batch_size=4)
    assert not choose_sync_bn("auto", accelerator, batch_norm_trains=True, batch_size=4).on


def test_global_batch_that_does_not_divide(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(folder), *TINY, "--global-batch-size", "9", "--grad-accum", "2"]) == 2
    assert "--global-batch-size 9: not a multiple of 2 (1 process x 2 accumulated" in capsys.readouterr().err


def test_linear_scaling_only_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", str(folder), *TINY, "--dry-run", "--lr", "0.1", "-b", "8", "--grad-accum", "4"]
    assert main(common) == 0
    assert "head=0.1\n" in capsys.readouterr().out
    assert main([*common, "--lr-base-size", "256", "--lr-backbone", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "times 0.125" in said and "layer4=0.00125 head=0.0125" in said


def test_unknown_tracker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(folder), *TINY, "--tracker", "tensorbored"]) == 2
    assert "--tracker tensorbored: Accelerate does not support it" in capsys.readouterr().err


@pytest.mark.matrix
def test_doctor_checks_that_two_processes_equal_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "learning rates of all steps: equal" in said
    assert "predictions for 7 images, every one once: equal" in said


def test_what_starts_processes_is_no_process_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own processes would take the launcher's ranks for theirs."""
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for verb, named in (("doctor", "self-test"), ("bench scaling", "bench")):
        assert main(verb.split()) == 2
        said = f"{named} starts its own processes: start it without accelerate launch or torchrun"
        assert capsys.readouterr().err == f"resnet-dist {verb}: error: {said}\n"


def test_doctor_notices_a_difference(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test whose two runs have different rates says so and fails."""
    from resnet_dist.runtime import self_test

    def fake(folder: Path, run: Path, processes: int) -> None:
        run.mkdir()
        (run / "metrics.jsonl").write_text(json.dumps({"lr": {"head": 0.1 * processes}, "loss": 1.0}) + "\n")

    monkeypatch.setattr(self_test, "_train", fake)
    assert main(["doctor"]) == 4
    assert "learning rates of all steps differ" in capsys.readouterr().err
