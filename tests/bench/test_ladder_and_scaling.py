"""`bench ladder` and `bench scaling`: what they run, and what they make of the numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.bench import scaling
from resnet_dist.bench.frame import Result
from resnet_dist.bench.ladder import GROUND, LEVERS
from resnet_dist.bench.options import BenchConfig, LadderConfig, ScalingConfig
from resnet_dist.bench.scaling_estimate import Cluster, Link, Step, estimate
from resnet_dist.bench.timing import Repeats
from resnet_dist.bench.training import begin, communication
from resnet_dist.cli.main import main
from resnet_dist.cli.parser import parse
from resnet_dist.config.layers import options_of
from resnet_dist.training.loop import train_step
from tests.conftest import TINY
from tests.training.helpers import job_of

SHORT = ["--batch-size", "4", "--img-size", "32", "--epoch-steps", "1", "--epochs", "2", "--workers", "0"]


def scaling_config(*arguments: str) -> ScalingConfig:
    made: ScalingConfig = parse(ScalingConfig, arguments, "resnet-dist bench scaling")
    return made


def test_shared_options_have_one_help_text_unless_a_program_has_its_own() -> None:
    bench, ladder, scaling_ = (
        {o.name: o.help for o in options_of(c)} for c in (BenchConfig, LadderConfig, ScalingConfig)
    )
    for texts in (bench, ladder, scaling_):
        assert [name for name, text in texts.items() if not text] == []
    assert {name for name in ladder if name in bench and ladder[name] != bench[name]} == {"epochs"}
    assert all(scaling_[name] == bench[name] for name in scaling_ if name in bench)


# The ladder


@pytest.mark.matrix
def test_every_rung_is_measured_in_every_round(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ladder.json"
    assert main(["bench", "ladder", str(folder), *SHORT, "--rounds", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rungs"]
    names = [row["rung"] for row in rows]
    assert names[0] == GROUND.name and names[1:] == [r.name for r in LEVERS if r.name in names]
    assert len(names) >= len(LEVERS)  # all, but for the one that only GPUs have
    for row in rows:
        assert 0 < row["lowest"] <= row["images_per_second"] <= row["highest"] and row["rounds"] == 2
    # Two rounds: the median is the mean of both.
    assert all(row["images_per_second"] == pytest.approx((row["lowest"] + row["highest"]) / 2) for row in rows)
    out = capsys.readouterr().out
    told = [line for line in out.splitlines() if line.startswith("round ")]
    assert told == [f"round {number} of 2: {name}" for number in (1, 2) for name in names]  # in turns
    assert f"{rows[-1]['images_per_second'] / rows[0]['images_per_second']:.2f}x" in out.splitlines()[-1]


def test_ladder_needs_at_least_two_epochs(refused: Any) -> None:
    assert "--epochs 1: must be at least 2" in refused(2, "bench", "ladder", "--epochs", "1")


# Scaling


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["photos", "--batch-size", "8", "--mixed-precision", "no", "--drop-last", "--no-tf32", "--workers", "0"],
        ["--lr-groups", "stem=1e-05 head=0.001", "--head", "mlp", "--head-hidden", "8,4", "--windows", "3"],
        ["--estimate", "--link-gbits", "25", "--link-latency", "8"],
    ],
)
def test_processes_get_the_options_of_the_user(typed: list[str]) -> None:
    """The command line that is made says the same to `bench` as what was typed."""
    cfg = scaling_config(*typed)
    given = parse(BenchConfig, [*scaling.arguments_of(cfg), *scaling.FULL_ONLY], "resnet-dist bench")
    for name in ("data", "preprocess", "augment", "model", "optim", "system", "windows", "epochs", "epoch_steps"):
        assert getattr(given, name) == getattr(cfg, name), name
    assert given.regimes == ("full",) and not given.predict


def report(processes: int, device: str, step: float, whole: float, alone: float | None = None) -> dict[str, Any]:
    """As `bench` writes it: images/s of a step per process, of whole training in all, seconds of a step alone."""
    compute: dict[str, Any] = {"step": {"images_per_second": step, "seconds": 1.0}}
    if alone is not None:
        compute["communication"] = {"step_alone": {"seconds": alone}, "all_reduce_bytes": {"median": 2e9}}
    training = {"later_epochs": {"images_per_second": whole}}
    machine = {"processes": processes, "device": device, "threads": 1}
    return {"machine": machine, "regimes": {"full": {"compute": compute, "training": training}}}


def test_efficiency_on_gpus_is_relative_to_the_number_of_processes() -> None:
    row = scaling.row(report(4, "cuda", 90.0, 300.0, alone=0.75), report(1, "cuda", 100.0, 100.0))
    assert row["step_images_per_second"] == 360.0
    assert row["step_efficiency"] == pytest.approx(0.9) and row["training_efficiency"] == pytest.approx(0.75)
    assert row["exposed_communication"] == pytest.approx(0.25)
    assert "25% of a step, 2 GB/s" in list(scaling.lines([row]))[1]


def test_efficiency_on_a_cpu_is_relative_to_one_process() -> None:
    row = scaling.row(report(2, "cpu", 45.0, 80.0, alone=1.1), report(1, "cpu", 100.0, 100.0))
    assert row["step_efficiency"] == pytest.approx(0.9) and row["training_efficiency"] == pytest.approx(0.8)
    assert row["exposed_communication"] == 0.0


def test_estimate_is_made_of_the_step_of_one_process() -> None:
    """A step of 100 ms, of which 60 are the backward pass; the rest is that of `estimate`."""
    one = report(1, "cuda", 2560.0, 2000.0)
    timings = {"forward": 0.03, "forward_backward": 0.09, "step": 0.1}
    compute = {name: {"seconds": value, "images": 256} for name, value in timings.items()} | {"gradient_bytes": 10**8}
    one["regimes"]["full"]["compute"] = compute
    cfg = scaling_config("--estimate", "--link-gbits", "40", "--link-latency", "6")
    result = scaling.with_estimate(Result({"reports": [one]}, ["table"]), cfg)
    expected = [estimate(Step(0.1, 10**8, 0.6), Cluster(Link(5e9, 6e-6)), gpus) for gpus in (8, 64, 512)]
    assert [row["efficiency"] for row in result.values["estimate"]["gpus"]] == pytest.approx(
        [one.efficiency for one in expected]
    )
    assert result.lines[0] == "table" and "5 GB/s and 6 us between nodes" in result.lines[3]
    assert result.lines[-1].split()[:3] == [
        "512",
        f"{512 * 256 / expected[2].seconds:,.0f}",
        f"{expected[2].efficiency:.0%}",
    ]


def test_step_without_reduction_does_not_sum_gradients(folder: Path, tmp_path: Path) -> None:
    """In DDP over a group of one process, whose reductions a hook counts: those of a step, and of one alone."""
    made = job_of(tmp_path / "run", folder, *TINY, "-b", "8", "--epochs", "2", "--lr", "0.01")
    job, learner = begin(made, "full", 2)
    batches = next(learner.source.train_loader.epoch(0))
    sums = []

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sums.append(1)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = DistributedDataParallel(learner.net)
        net.register_comm_hook(None, hook)
        learner = dataclasses.replace(learner, net=net, forward=net)
        train_step(job, learner, batches)
        assert sums
        sums.clear()
        found = communication(job, learner, batches, Repeats(windows=2, steps=1, warmup=1))
        assert not sums and found["step_alone"]["images"] == 8
    finally:
        dist.destroy_process_group()


def test_options_that_cannot_be_scaled_are_refused(refused: Any, tmp_path: Path) -> None:
    assert "--world-sizes 0: must be at least 1" in refused(2, "bench", "scaling", "--world-sizes", "0")
    assert "--link-gbits 0: must be above 0" in refused(2, "bench", "scaling", "--estimate", "--link-gbits", "0")
    assert "use --aug none without" in refused(2, "bench", "scaling", "--cache", "device")


@pytest.mark.matrix
def test_one_and_two_processes_are_measured(folder: Path, tmp_path: Path) -> None:
    """The parts of `bench` that processes do together: sums of gradients, and parameters equal at the end."""
    file = tmp_path / "scaling.json"
    fast = ["--windows", "2", "--window-steps", "1", "--warmup-steps", "0", "--mixed-precision", "no", "--threads", "1"]
    assert main(["bench", "scaling", str(folder), *SHORT, *fast, "--json", str(file)]) == 0
    one, two = json.loads(file.read_text())["worlds"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert "all_reduce_bytes" in two and "all_reduce_bytes" not in one
    assert 0 <= two["exposed_communication"] < 1


@pytest.mark.matrix
def test_failed_process_gives_one_line(refused: Any, tmp_path: Path) -> None:
    said = refused(4, "bench", "scaling", tmp_path / "nothing", *SHORT)
    assert "failed" in said and "there is no such folder or manifest" in said
