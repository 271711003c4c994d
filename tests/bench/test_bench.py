"""`resnet-dist bench`: what it writes hangs together, and its verdict follows from it; never how fast anything is."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.bench.loading import fastest, loading
from resnet_dist.bench.options import BenchConfig
from resnet_dist.bench.report import lines, verdict
from resnet_dist.bench.run import notes
from resnet_dist.bench.synthetic import DIFFERENT, photographs
from resnet_dist.bench.timing import Repeats
from resnet_dist.bench.training import enough_steps
from resnet_dist.cli.main import main
from resnet_dist.cli.parser import parse
from resnet_dist.data.loader import DeviceImages, TrainLoader
from resnet_dist.training.job import Job
from tests.conftest import TINY
from tests.training.helpers import config_of, job_of

SHORT = ["--batch-size", "8", "--img-size", "64", "--windows", "3", "--window-steps", "1", "--warmup-steps", "0"]
SHORT += [
    "--cache",
    "ram",
    "--epochs",
    "2",
    "--epoch-steps",
    "3",
    "--workers",
    "0",
    "--threads",
    "1",
    "--mixed-precision",
    "no",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a short run on synthetic photographs, as read from its file."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    assert main(["bench", *SHORT, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def timings(value: Any) -> list[dict[str, Any]]:
    """Everything in a report that says how long so many images took."""
    if isinstance(value, dict):
        own = [value] if "images_per_second" in value else []
        return own + [timing for inner in value.values() for timing in timings(inner)]
    return []


def test_report_has_all_parts(made: dict[str, Any]) -> None:
    assert set(made) == {
        "format_version", "machine", "settings", "roofs", "loading", "regimes", "notes", "verdict", "predict",
    }  # fmt: skip
    assert list(made["loading"]["from_files"]) == ["read", "decode", "transform", "batch", "loader", "input"]
    assert list(made["loading"]["from_kept"]) == ["get", "loader", "input"]
    assert list(made["regimes"]) == ["full", "layer4+head", "head"]
    for regime in made["regimes"].values():
        assert set(regime) >= {"work", "compute", "limits", "training", "peak_memory", "features_are_kept"}
        assert set(regime["compute"]) == {"forward", "forward_backward", "step", "gradient_bytes"}
    assert made["settings"] | {"precision": "no", "training_images": 24, "data": "synthetic"} == made["settings"]


def test_images_per_second_are_images_divided_by_seconds(made: dict[str, Any]) -> None:
    found = timings(made)
    assert len(found) == 6 + 3 + 3 * (3 + 2) + 1
    for timing in found:
        assert timing["images_per_second"] == pytest.approx(timing["images"] / timing["seconds"])
        assert 0 < timing["p10"] <= timing["seconds"] <= timing["p90"]


def test_steps_and_epochs_count_the_right_number_of_images(made: dict[str, Any]) -> None:
    for regime in made["regimes"].values():
        assert {timing["images"] for timing in timings(regime["compute"])} == {8}
        assert {timing["images"] for timing in timings(regime["training"])} == {24}
        assert regime["training"]["steps_per_epoch"] == 3
        assert 0 <= regime["training"]["data_wait_share"] <= 1


def test_overlap_is_relative_to_the_slower_of_loading_and_computing(made: dict[str, Any]) -> None:
    load = made["loading"]["from_kept"]["loader"]["images_per_second"]
    for regime in made["regimes"].values():
        slower = min(load, regime["compute"]["step"]["images_per_second"])
        whole = regime["training"]["later_epochs"]["images_per_second"]
        assert regime["training"]["overlap"] == pytest.approx(whole / slower)


def test_fewer_trainable_stages_mean_less_work(made: dict[str, Any]) -> None:
    full, layer4, head = (made["regimes"][name]["work"] for name in ("full", "layer4+head", "head"))
    for what in ("flops_per_image", "bytes_per_image"):
        assert full[what] > layer4[what] > head[what] > 0
    assert full["roofline_images_per_second"] < head["roofline_images_per_second"]


def test_shares_follow_from_rates_and_roofs(made: dict[str, Any]) -> None:
    for regime in made["regimes"].values():
        rate = regime["compute"]["step"]["images_per_second"]
        done = rate * regime["work"]["flops_per_image"]
        assert regime["limits"]["share_of_gemm"] == pytest.approx(done / made["roofs"]["gemm_flops"]["fp32"]["median"])
        moved = rate * regime["work"]["bytes_per_image"]
        assert regime["limits"]["share_of_copy"] == pytest.approx(moved / made["roofs"]["copy_bytes"]["median"])
        # The roofline is never above either of the two roofs by itself.
        assert regime["limits"]["share_of_roofline"] >= max(
            regime["limits"]["share_of_gemm"], regime["limits"]["share_of_copy"]
        )


def test_text_report_has_a_line_for_every_timing(made: dict[str, Any]) -> None:
    text = list(lines(made))
    assert text[-1] == f"verdict: {made['verdict']}"
    for timing in timings(made):
        assert any(f"{timing['images_per_second']:,.1f}" in line for line in text)
    assert max(map(len, text)) < 160


# The verdict


WAITING = {"regimes__full__training__data_wait_share": 0.6}


def changed(made: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A report in which nothing is wrong but what `values` says; a dot in a name is written as two underscores."""
    found = copy.deepcopy(made)
    calm = {"machine__threads": 2, "machine__cores_per_process": 2, "settings__precision": "bf16"}
    calm |= {"regimes__full__training__data_wait_share": 0.02, "roofs__gemm_flops__bf16": {"median": 2e11}}
    calm |= {f"regimes__{name}__training__later_epochs__images_per_second": 10.0 for name in found["regimes"]}
    for path, value in {**calm, **values}.items():
        *parents, last = path.split("__")
        place = found
        for parent in parents:
            place = place[parent]
        place[last] = value
    return found


def test_verdict_if_nothing_is_wrong(made: dict[str, Any]) -> None:
    share = made["regimes"]["full"]["limits"]["share_of_roofline"]
    expected = f"compute-bound at {share:.0%} of the roofline of this machine; the data keeps up"
    assert verdict(changed(made)) == expected


@pytest.mark.parametrize(
    ("values", "cause", "remedy"),
    [
        ({"machine__threads": 1}, "1 of 2 CPU cores in use", "--threads 2"),
        ({"regimes__full__training__data_wait_share": 0.6}, "data-bound: waits 60% of the time", "smaller files"),
        (
            {
                "regimes__full__training__data_wait_share": 0.6,
                "machine__cores_per_process": 2,
                "machine__device": "cuda",
            },
            "data-bound",
            "--workers 2",
        ),
        (
            {"settings__precision": "no", "roofs__gemm_flops__fp32": {"median": 1e11}},
            "2.0x as fast",
            "--mixed-precision",
        ),
        ({"regimes__full__compute__step__host_share": 0.97}, "launch-bound", "--batch-size 16"),
        ({"regimes__head__training__later_epochs__images_per_second": 30.0}, "compute-bound", "only head is 3.0x"),
    ],
)
def test_verdict_names_what_limits_and_what_to_change(
    made: dict[str, Any], values: dict[str, Any], cause: str, remedy: str
) -> None:
    said = verdict(changed(made, **values))
    assert cause in said.partition(" -> ")[0] and remedy in said.partition(" -> ")[2]


# What is measured, and what is not


def with_workers(job: Job, workers: int) -> Job:
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, workers=workers))


def test_epochs_are_long_enough_for_every_loader_process(folder: Path, tmp_path: Path) -> None:
    """By default; with fewer steps, from --epoch-steps or too few images, the report says what it measures."""
    job = job_of(tmp_path / "run", folder, *TINY, "-b", "8", "--cache", "device", "--aug", "none")  # 3 steps
    for workers, expected in (("0", 6), ("1", 6), ("2", 8), ("16", 64)):
        assert enough_steps(job.accelerator, config_of(folder, *TINY, "--workers", workers)) == expected
    assert list(notes(job)) == ["on a cpu, --cache device caches images in memory, not on the device"]
    first = next(notes(with_workers(job, 2)))
    assert "epochs of 3 steps with 2 loader processes" in first and "--epoch-steps 8 or more" in first


def test_images_on_the_device_are_loaded_from_there(folder: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path / "run", folder, *TINY, "-b", "8", "--cache", "device", "--aug", "none")
    samples = DeviceImages(job.train_images, job.accelerator.device, 0)
    on_device = dataclasses.replace(job, train_loader=TrainLoader(samples, job.train_loader.batches, 0, False))
    found = loading(on_device, Repeats(1, 1, 0))
    assert list(found) == ["from_files", "from_device"] and fastest(found) is found["from_device"]
    assert list(fastest(found)) == ["loader", "input"] and list(notes(with_workers(on_device, 9))) == []


def test_many_synthetic_photographs_are_made_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further ones are names of the first, in the same class."""
    assert DIFFERENT % 2 == 0
    monkeypatch.setattr("resnet_dist.bench.synthetic.DIFFERENT", 2)
    photographs(tmp_path, 5)
    names = {kind: sorted((tmp_path / "train" / kind).iterdir()) for kind in "ab"}
    assert [len(files) for files in names.values()] == [3, 2] and len(list((tmp_path / "val").rglob("*.jpg"))) == 2
    for files in names.values():
        assert len({file.stat().st_ino for file in files}) == 1


# Options


def test_images_of_a_folder_are_measured(folder: Path, tmp_path: Path) -> None:
    """Of 24 training images two batches are taken; one regime only, and no export."""
    file = tmp_path / "bench.json"
    tiny = [*SHORT[4:], "--batch-size", "4", "--img-size", "32", "--epoch-steps", "2", "--regimes", "head"]
    assert main(["bench", str(folder), *tiny, "--aug", "none", "--no-predict", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["settings"]["data"] == "images" and found["settings"]["training_images"] == 8
    assert list(found["regimes"]) == ["head"] and "predict" not in found
    # The images are the same in every epoch, so their features are kept and the step is the head's alone.
    head = found["regimes"]["head"]
    assert head["features_are_kept"] and head["work"]["flops_per_image"] == 2 * 2 * 512 * found["settings"]["classes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--windows", "0"], "--windows 0: must be at least 1"),
        (["--epoch-steps", "0"], "--epoch-steps 0: must be at least 1"),
        (["--regimes", "body"], "--regimes body: must be one of full, layer4+head, head"),
        (["--json", "nowhere/bench.json"], "--json nowhere/bench.json: the folder nowhere does not exist"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--cache", "device"], "add --augment-on device, or use --aug none without --mixup"),
        (
            ["--cache", "device", "--aug", "none", "--mixup", "0.2"],
            "add --augment-on device, or use --aug none without --mixup",
        ),
    ],
)
def test_options_that_cannot_be_measured_are_refused(refused: Any, arguments: list[str], said: str) -> None:
    assert said in refused(2, "bench", *arguments)


@pytest.mark.parametrize(
    ("typed", "images"), [("-b 8", 16), ("-b 8 --grad-accum 4", 64), ("--global-batch-size 24 --grad-accum 3", 24)]
)
def test_as_many_photographs_are_made_as_a_step_takes(typed: str, images: int) -> None:
    cfg: BenchConfig = parse(BenchConfig, typed.split(), "resnet-dist bench")
    assert cfg.images_per_step(processes=2) == images


def test_images_on_the_device_may_be_changed_there() -> None:
    assert parse(BenchConfig, ["--cache", "device", "--augment-on", "device"], "resnet-dist bench").data.data is None


def test_missing_data_is_refused(refused: Any, tmp_path: Path) -> None:
    assert "there is no such folder or manifest" in refused(3, "bench", tmp_path / "nothing")
