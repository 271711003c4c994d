"""What needs a GPU: the numbers of a CPU, no wait for the device within a step, and what only CUDA can break.

Nearly all of it runs in this process, so that few programs have to start: `pytest -n 0 -m gpu tests/test_gpu.py` takes
a few minutes, and has the GPU to itself.
"""

import copy
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import resnet_dist.training.loop as loop
from export.predict import Preprocessing
from resnet_dist.cli.main import main
from resnet_dist.config.schema import AugmentConfig, DataConfig
from resnet_dist.data.device_augment import AugmentOnDevice, DrawnImages, KeptImages
from resnet_dist.data.index import read_index
from resnet_dist.data.loader import DeviceImages, TrainImages, close_loaders
from resnet_dist.data.prefetch import copied_ahead
from resnet_dist.data.transforms import Batch, ToInput, mix_of_pair
from resnet_dist.errors import NonFiniteError
from resnet_dist.model.head import dropout_mask
from resnet_dist.model.trainable import train_mode
from resnet_dist.training.features import Features
from resnet_dist.training.job import Job
from tests.conftest import TINY, make_folder, run_program
from tests.training.helpers import job_of
from tests.training.interrupted import interrupt

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Six steps of 24 images; float32 without TF32, so that a CPU can be compared with. What comes later in a list wins.
OPTIONS = [*TINY, "--img-size", "32", "--batch-size", "8", "--epochs", "2", "--lr", "0.001", "--log-every", "1"]
OPTIONS += ["--no-tf32"]
# With a 7x7 convolution and max pooling, at a rate at which rounding does not grow: at 0.001, a change of the weights
# by 1e-7 changes the loss of the fifth step by 3 %, on a CPU too.
STANDARD = ["--stem", "standard", "--img-size", "64", "--lr", "0.0001"]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Loader processes, memory of the GPU and Accelerate's state do not outlive a test."""
    yield
    close_loaders()
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.cuda.empty_cache()


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within it, a run of this process computes on the CPU, as if it were started there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def set_scale(job: Job, scale: float, backoff: float = 0.5) -> None:
    """Let fp16 begin with this scale of the loss, and go down by this factor after an overflow."""
    job.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=scale, backoff_factor=backoff)


def logged(run: Path) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path, *arguments: str | Path) -> list[float]:
    """The loss of every step of the loop, without the program around it."""
    job = job_of(run, *arguments)
    if job.accelerator.scaler is not None:
        set_scale(job, 1024.0)  # with fp16's usual one the first steps may overflow, and others cannot be compared with
    loop.train(job)
    return logged(run)


def losses_on_cpu(run: Path, *arguments: str | Path) -> list[float]:
    with on_cpu():
        return losses(run, *arguments, "--mixed-precision", "no", "--threads", "4")


# Numbers


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ("", 5e-3),
        ("--batch-norm-stats frozen", 5e-3),
        ("--mixed-precision bf16", 0.1),
        ("--mixed-precision fp16", 0.05),
        ("--model resnet50 --mixed-precision bf16", 0.1),
        ("--mixup 0.4 --label-smoothing 0.1 --opt adamw --lr 1e-4 --grad-accum 2 --batch-size 4 --ema", 5e-3),
        ("--head concat-pool --dropout 0.5 --aug trivial --cutmix 1 --clip-grad 1 --class-weights balanced", 2e-2),
    ],
)
def test_losses_are_near_the_cpus(folder: Path, tmp_path: Path, options: str, tolerance: float) -> None:
    arguments = [folder, *OPTIONS, *options.split()]
    found = losses(tmp_path / "gpu", *arguments)
    assert found == pytest.approx(losses_on_cpu(tmp_path / "cpu", *arguments), rel=tolerance)


@pytest.mark.parametrize(("options", "tolerance"), [("", 1e-2), ("--mixed-precision bf16", 0.15)])
def test_standard_stem_and_batch_norm_with_loader_processes(
    folder: Path, tmp_path: Path, options: str, tolerance: float
) -> None:
    """What users run: the statistics learn, and four processes load into pinned memory."""
    arguments = [folder, *OPTIONS, *STANDARD, *options.split()]
    found = losses(tmp_path / "gpu", *arguments, "--workers", "4")
    assert found == pytest.approx(losses_on_cpu(tmp_path / "cpu", *arguments), rel=tolerance)


def batch_of_all_values(device: torch.device) -> Batch:
    """Four images that hold every value in every channel, two of them mirrored, mixed by MixUp and by CutMix."""
    values = torch.stack([torch.arange(256, dtype=torch.uint8).roll(17 * shift) for shift in range(12)])
    images = values.reshape(4, 3, 16, 16).permute(0, 2, 3, 1).contiguous()
    rows = [mix_of_pair(5, AugmentConfig(mixup=0.4), 16)] * 2 + [mix_of_pair(5, AugmentConfig(cutmix=1.0), 16)] * 2
    number = torch.arange(4)
    mix = torch.tensor(rows, dtype=torch.float32)
    return Batch(images, number, number, number + 1, torch.tensor([True, False, False, True]), mix).to(device)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_input_of_the_network_has_the_bits_of_the_cpus(is_mixed: bool) -> None:
    found = []
    for device in (torch.device("cpu"), GPU):
        batch = batch_of_all_values(device)
        batch.mix = batch.mix if is_mixed else None
        found.append(ToInput(Preprocessing(img_size=16), device)(batch).cpu())
    differs = found[0] != found[1]
    assert not differs.any(), f"{int(differs.sum())} of {differs.numel()} values differ"


COLOURS = {"color_jitter": 0.4, "rotation": 9.0}


@pytest.mark.parametrize(("options", "share"), [({"erasing": 0.5}, 0.0), (COLOURS, 0.01)], ids=["geometry", "colours"])
@pytest.mark.parametrize("tf32", [False, True])
def test_augmentation_on_the_device_gives_the_pixels_of_the_cpu(
    folder: Path, options: dict[str, float], share: float, tf32: bool
) -> None:
    """All of them for crops and erasing; colours and rotation round, so that a few differ."""
    table = read_index(DataConfig(data=str(folder))).train
    cfg = AugmentConfig(**options)  # type: ignore[arg-type]
    images = TrainImages(table, Preprocessing(img_size=32, resize=32), cfg, seed=3)
    keys = [(epoch, index) for epoch in range(9) for index in range(9)]
    found = []
    torch.backends.cuda.matmul.allow_tf32 = tf32
    for device in (torch.device("cpu"), GPU):
        kept = KeptImages(images, device, 0)
        batch = DrawnImages(images, kept.sizes).__getitems__(keys).to(device)
        found.append(AugmentOnDevice(kept, images)(batch).cpu().int())
    torch.backends.cuda.matmul.allow_tf32 = False
    away = (found[0] - found[1]).abs()
    assert float((away > 0).float().mean()) <= share and int(away.max()) <= 3


def test_dropout_masks_are_those_of_the_cpu() -> None:
    keys = torch.randint(0, 2**63 - 1, (64,), generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        assert torch.equal(dropout_mask(keys.to(GPU), 512, 0.3, layer).cpu(), dropout_mask(keys, 512, 0.3, layer))


# A step


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ("--opt sgd", 0),
        ("--opt sgd --mixed-precision fp16 --clip-grad 1", 0),
        ("--opt adam --mixed-precision fp16 --ema", 0),
        ("--opt adamw --mixed-precision bf16 --ema --clip-grad 1 --grad-accum 2 --batch-size 4 --cutmix 1", 0),
        ("--mixed-precision bf16 --mixup 1 --loss focal --class-weights balanced", 0),
        # None if torch has a fused form for CUDA. torch 2.11 has not: it asks the host for every parameter's step too.
        ("--opt adagrad", 63),
        ("--head concat-pool --dropout 0.5 --mixed-precision bf16 --aug trivial --workers 2", 0),
        ("--trainable head --aug none --mixed-precision bf16 --dropout 0.5", 0),
        ("--aug none --cache device --mixed-precision bf16", 0),
        ("--opt rmsprop", 1),  # it has no fused form: the host asks whether the gradient was finite
        ("--opt rmsprop --mixed-precision fp16", 1),
    ],
)
def test_a_step_does_not_wait_for_the_gpu(folder: Path, tmp_path: Path, options: str, waits: int) -> None:
    job = job_of(tmp_path / "run", folder, *OPTIONS, *options.split())
    learner = loop.begin_phase(job, job.plan.phases[0])
    learner.source.fill(job)
    train_mode(job.model, learner.phase.updating)
    first, *others = learner.source.train_loader.epoch(0)
    loop.train_step(job, learner, first)  # it sets up what the others find
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for step in others:
                loop.set_rates(learner.optimizer, 0.5)
                loop.train_step(job, learner, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename}:{w.lineno}" for w in noted if "called a synchronizing" in str(w.message)]
    assert len(places) <= waits * len(others), places


def test_batches_that_are_copied_ahead_arrive_whole() -> None:
    """The GPU is busy with a step while the next batch is copied, into memory that earlier ones have left."""

    def steps() -> Iterator[list[Batch]]:
        for number in range(40):
            place = torch.tensor([number])
            yield [Batch(torch.full((64, 224, 224, 3), number, dtype=torch.uint8), place, place, place).pin_memory()]

    found = []
    for (batch,) in copied_ahead(steps(), GPU):
        torch.cuda._sleep(2_000_000)
        found.append(torch.stack([batch.images.amin(), batch.images.amax(), batch.targets[0].to(torch.uint8)]))
    assert torch.stack(found).tolist() == [[number] * 3 for number in range(40)]


@pytest.mark.parametrize("opt", ["sgd", "adam", "rmsprop"])
def test_fp16_survives_an_overflow_in_the_first_step(folder: Path, tmp_path: Path, opt: str) -> None:
    """That step moves nothing, and the second one moves the parameters as a first step does."""
    job = job_of(tmp_path / "run", folder, *OPTIONS, "--mixed-precision", "fp16", "--opt", opt, "--lr", "1e-3")
    set_scale(job, 2.0**60, 2.0**-50)
    learner = loop.begin_phase(job, job.plan.phases[0])
    train_mode(job.model, learner.phase.updating)
    batches = list(learner.source.train_loader.epoch(0))
    # Whatever is taken from memory without being set holds large values.
    large = [torch.full((1 << size,), 1e38, device=GPU) for size in (6, 12, 18, 21) for _ in range(32)]
    del large
    parameters = list(job.model.parameters())
    before = copy.deepcopy(parameters)
    loop.train_step(job, learner, batches[0])
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    loop.train_step(job, learner, batches[1])
    moves = [float((b - a).detach().abs().max()) for a, b in zip(before, parameters, strict=True)]
    assert 0 < max(moves) < 0.5


def test_fp16_that_never_takes_a_step_ends_the_run(folder: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path / "run", folder, *OPTIONS, "--mixed-precision", "fp16", "--epochs", "30")
    set_scale(job, 2.0**60, 0.9999)
    with pytest.raises(NonFiniteError):
        loop.train(job)


def test_compiled_in_the_middle_of_a_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step: the losses go on as they would have."""
    arguments = [folder, *OPTIONS, *STANDARD]
    expected = losses(tmp_path / "eager", *arguments, "--compile", "off")
    monkeypatch.setattr(loop, "pays", lambda *_: True)
    compiled = []
    monkeypatch.setattr(loop, "compiled", lambda net: compiled.append(net) or torch.compile(net, dynamic=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's advice about TF32
        found = losses(tmp_path / "compiled", *arguments, "--compile", "auto")
    assert len(compiled) == 1
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("options", [[], ["--trainable", "layer4 head", "--dropout", "0.5", "--ema"]])
def test_replayed_graphs_equal_plain_steps(folder: Path, tmp_path: Path, options: list[str]) -> None:
    """Twelve steps: the first are recorded, the others replayed. The masks of dropout differ from step to step."""
    arguments = [folder, *OPTIONS, *STANDARD, "--epochs", "4", *options]
    expected = losses(tmp_path / "eager", *arguments, "--compile", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's advice about TF32
        found = losses(tmp_path / "graphs", *arguments, "--compile", "graphs")
    assert found == pytest.approx(expected, rel=1e-2)


# What is kept on the GPU


def test_images_kept_on_the_gpu_are_those_that_are_decoded(folder: Path, tmp_path: Path) -> None:
    found = {}
    for cache in ("none", "device"):
        job = job_of(tmp_path / cache, folder, *OPTIONS, "--aug", "none", "--cache", cache)
        images = [batch.images for step in job.train_loader.epoch(0) for batch in step]
        assert isinstance(job.val_loader._loader.samples, DeviceImages) == (cache == "device")
        assert {image.device.type for image in images} == {GPU.type if cache == "device" else "cpu"}
        loop.train(job)
        found[cache] = torch.cat([image.cpu() for image in images]), logged(tmp_path / cache)
    assert torch.equal(found["none"][0], found["device"][0])
    assert found["device"][1] == pytest.approx(found["none"][1], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        ["--trainable", "head", "--dropout", "0.3"],
        ["--trainable", "layer4 head", "--opt", "adam", "--lr", "1e-3", "--mixed-precision", "bf16"],
    ],
)
def test_kept_features_train_as_images_do(folder: Path, tmp_path: Path, options: list[str]) -> None:
    found = {}
    for how in ("off", "auto"):
        job = job_of(tmp_path / how, folder, *OPTIONS, "--aug", "none", *options, "--cache-features", how)
        chosen = loop.source(job, job.plan.phases[0])
        assert isinstance(chosen.train_input, Features) == (how == "auto")
        loop.train(job)
        found[how] = logged(tmp_path / how)
    assert found["auto"] == pytest.approx(found["off"], rel=0.05 if "bf16" in options else 2e-3)


def test_loader_processes_do_not_touch_the_gpu(folder: Path, tmp_path: Path) -> None:
    """Only one process uses the GPU, although loader processes run."""
    job = job_of(tmp_path / "run", folder, *OPTIONS, "--workers", "4")
    for step in job.train_loader.epoch(0):
        step[0].to(GPU)
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    rows = done.stdout.split("\n")[:-1]
    if done.returncode or not rows:
        pytest.skip(f"nvidia-smi does not name the processes here: {done.stdout} {done.stderr}")
    assert len(rows) == 1, rows


# A group of one


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the only rank of a job, as torchrun would have started it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    # Accelerate wraps nothing for a group of one; what it wraps for many is what these tests are about.
    monkeypatch.setattr(PartialState, "use_distributed", property(lambda _: True))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gradients(job: Job, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """The wrapped network, and the gradients of three steps from the same weights."""
    learner = loop.begin_phase(job, job.plan.phases[0])
    train_mode(job.model, learner.phase.updating)
    found: list[dict[str, torch.Tensor]] = []

    def note(_: Job, learner: Any) -> None:
        found.append({name: p.grad.clone() for name, p in job.model.named_parameters() if p.grad is not None})
        learner.optimizer.zero_grad()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", note)
        for step in learner.source.train_loader.epoch(0):
            loop.train_step(job, learner, step)
    return learner.net, found


@pytest.mark.parametrize(
    "options", ["", "--sync-bn on", "--grad-accum 2 --batch-size 4", "--trainable head --cache-features off"]
)
def test_ddp_and_sync_bn_alone_change_no_gradient(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, options: str
) -> None:
    arguments = [folder, *OPTIONS, *STANDARD, *options.split()]
    _, expected = gradients(job_of(tmp_path / "plain", *arguments, "--sync-bn", "off"), monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)
    request.getfixturevalue("group_of_one")
    job = job_of(tmp_path / "group", *arguments)
    net, found = gradients(job, monkeypatch)
    assert isinstance(net, DistributedDataParallel) and torch.distributed.get_backend() == "nccl"
    assert any(isinstance(m, nn.SyncBatchNorm) for m in job.model.modules()) == ("--sync-bn" in options)
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_gradients_sent_in_bf16_are_near(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    expected = losses(tmp_path / "plain", folder, *OPTIONS)
    AcceleratorState._reset_state(reset_partial_state=True)
    request.getfixturevalue("group_of_one")
    found = losses(tmp_path / "group", folder, *OPTIONS, "--ddp-comm-hook", "bf16")
    assert found == pytest.approx(expected, rel=0.05) and found != expected


def test_program_under_torchrun(folder: Path, tmp_path: Path) -> None:
    """The whole program, started as a user starts it: what DDP adds changes nothing."""
    arguments = [folder, *OPTIONS]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "resnet_dist", "train"]
    command = [sys.executable, *launch, *map(str, arguments), "-o", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert logged(tmp_path / "run") == pytest.approx(losses_on_cpu(tmp_path / "cpu", *arguments), rel=5e-3)


# The program


@pytest.mark.parametrize(("precision", "number"), [("no", "SIGTERM"), ("fp16", "SIGTERM"), ("bf16", "SIGKILL")])
def test_interrupted_run_continues_as_if_uninterrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, number: str
) -> None:
    options = [*OPTIONS, "--epochs", "3", "--save-every", "2steps", "--opt", "adam", "--lr", "1e-4", "--ema"]
    options += ["--mixed-precision", precision]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(["train", str(folder), *options, "-o", str(whole)]) == 0
    words = ["train", str(folder), *options, "-o", str(run)]
    if number == "SIGKILL":
        command = [
            sys.executable,
            "-m",
            "tests.training.interrupted",
            "mid-epoch",
            str(int(signal.SIGKILL)),
            "0",
            *words,
        ]
        assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch:
            interrupt("mid-epoch", lambda: os.kill(os.getpid(), signal.SIGTERM), patch.setattr)
            assert main(words) == 75
    assert main(["train", "--resume", str(run)]) == 0
    assert len(logged(whole)) == 9
    assert logged(run) == pytest.approx(logged(whole), rel=1e-2 if precision == "no" else 0.1)


def predictions(folder: Path) -> tuple[list[str], list[float]]:
    """The classes that an evaluation found, and the loss of every image."""
    with (folder / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row["prediction"] for row in rows], [float(row["loss"]) for row in rows]


def test_trained_run_is_evaluated_exported_and_explained(folder: Path, tmp_path: Path) -> None:
    """In float32, evaluations on the GPU and on the CPU agree; every verb that computes does so on the GPU."""
    run = tmp_path / "run"
    recipe = ["--recipe", "head-then-all", "--phase", "1.epochs=1", "--epochs", "3", "--workers", "2", "--autotune"]
    options = [*OPTIONS, *STANDARD, "--mixed-precision", "auto", *recipe]
    assert main(["train", str(folder), *options, "-o", str(run)]) == 0
    assert main(["eval", str(run), "-o", str(tmp_path / "gpu")]) == 0
    with on_cpu():
        assert main(["eval", str(run), "-o", str(tmp_path / "cpu")]) == 0
    on_gpu, cpu = predictions(tmp_path / "gpu"), predictions(tmp_path / "cpu")
    assert on_gpu[0] == cpu[0] and len(cpu[0]) == 15
    assert on_gpu[1] == pytest.approx(cpu[1], rel=1e-3, abs=1e-4)
    assert main(["export", str(run), "-o", str(tmp_path / "export")]) == 0
    assert main(["explain", str(run), "-o", str(tmp_path / "explain")]) == 0
    assert main(["lr-find", str(folder), *OPTIONS, "--steps", "10", "-o", str(tmp_path / "lr")]) == 0


def test_deterministic_runs_are_equal_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, "-m", "resnet_dist", "train", str(folder), *OPTIONS, "--mixed-precision", "bf16"]
    command += ["--deterministic", "-o"]
    started = [subprocess.Popen([*command, str(run)], stderr=subprocess.PIPE, text=True) for run in runs]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert logged(runs[0]) == logged(runs[1])
    assert "CuBLAS" not in said[0]  # torch would say so if cuBLAS might not be deterministic


def test_batch_that_does_not_fit_is_one_line(folder: Path, tmp_path: Path) -> None:
    """Code 4, and what to try."""
    options = [*OPTIONS, "--model", "resnet50", *STANDARD, "--aug", "none", "--batch-size", "100000"]
    done = run_program("train", folder, *options, "-o", tmp_path / "run")
    assert done.returncode == 4, done.stderr[-4000:]
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and "out of memory with 100000 images per process" in lines[0], done.stderr[-4000:]
    assert "Traceback" not in done.stderr


def test_largest_batch_trains_and_one_twice_as_large_does_not_fit(folder: Path, tmp_path: Path) -> None:
    """With a limit on the process's memory, so that it takes seconds: of 240 images, all would fit otherwise."""
    options = ["--model", "resnet50", "--weights", "none", "--img-size", "224", "--epochs", "1", "--threads", "1"]
    data = make_folder(tmp_path / "images", train=80, val=2)
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(6 * 2**30 / total)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, total))
            job = job_of(tmp_path / "run", data, *options, "--batch-size", "auto", "--mixed-precision", "no")
        size = job.plan.share.batch_size
        assert 8 <= size < 160, size
        loop.train(job)
        del job
        with pytest.raises(torch.OutOfMemoryError):
            loop.train(job_of(tmp_path / "more", data, *options, "-b", str(2 * size), "--mixed-precision", "no"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
