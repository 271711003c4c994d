"""The number of processes changes the time, not the data, the schedule, the loss or the metrics."""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import made_once, make_folder
from tests.runtime.equality import GLOBAL_BATCH, OF_THREE, SCENARIOS, SCHEDULES
from tests.runtime.launch import launched, results_in

Found = list[dict[str, Any]]
WORLDS = [2, pytest.param(3, marks=pytest.mark.matrix)]


def of(names: Iterable[str]) -> pytest.MarkDecorator:
    """Each of the names with two processes, and those of OF_THREE with three as well."""
    cells = [(2, name) for name in names]
    more = [pytest.param(3, name, marks=pytest.mark.matrix) for name in names if name in OF_THREE]
    return pytest.mark.parametrize(("many", "name"), [*cells, *more], indirect=["many"])


def found_by(processes: int, factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """What so many processes find with 42 training images of three classes: the last global batch is filled up."""

    def make(out: Path) -> None:
        launched(processes, out, "tests.runtime.equality", make_folder(out / "images", train=14, val=5))

    out = made_once(factory, f"equality-{processes}", make)
    return out, results_in(out, processes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    return found_by(1, tmp_path_factory)


@pytest.fixture(scope="module", params=WORLDS)
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    return found_by(request.param, tmp_path_factory)


Result = tuple[Path, Found]


def steps(out: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rank0" / run / "metrics.jsonl").read_text().splitlines()]


def test_the_first_line_has_the_number_of_processes(many: Result) -> None:
    _, found = many
    assert all(result["line"].startswith(f"{len(found)} processes on cpu, gloo") for result in found)


def test_different_settings_are_noticed_by_all(many: Result) -> None:
    others = ", ".join(map(str, range(1, len(many[1]))))
    said = f"the processes have different settings of --lr (0.1 on rank 0; 0.2 on rank {others}); give all of them the"
    assert all(result["settings"].startswith(said) for result in many[1])


def test_work_of_the_main_process_is_awaited_on_the_cpu_next_to_nccl(many: Result) -> None:
    assert all(result["on main"] == {"answer": {"from": 0}, "is_own": True, "minutes": 7.0} for result in many[1])


@of(SCHEDULES)
def test_learning_rates_are_identical(one: Result, many: Result, name: str) -> None:
    expected = [row["lr"] for row in steps(one[0], f"rates-{name}")]
    assert len(expected) == 8 and (name == "constant") is (len({str(rate) for rate in expected}) == 1)
    assert [row["lr"] for row in steps(many[0], f"rates-{name}")] == expected


def test_samples_pixels_partners_and_masks_are_identical(one: Result, many: Result) -> None:
    """Of every optimizer step, the processes together have what one process has alone."""
    for step, alone in enumerate(one[1][0]["batches"]):
        together = [sample for result in many[1] for sample in result["batches"][step]]
        assert len(together) == len(alone) == GLOBAL_BATCH
        assert sorted(together, key=str) == sorted(alone, key=str)
    everything = [sample["pixels"] for step in one[1][0]["batches"] for sample in step]
    assert len(set(everything)) > 80, "the epochs were to be augmented differently"


@of(SCENARIOS)
def test_gradient_of_the_first_step(one: Result, many: Result, name: str) -> None:
    expected = one[1][0][name]["gradient"]
    for result in many[1]:
        difference = (result[name]["gradient"] - expected).norm() / expected.norm()
        assert difference < 1e-5


@of(SCENARIOS)
def test_losses_are_the_same(one: Result, many: Result, name: str) -> None:
    expected = [row["loss"] for row in steps(one[0], f"run-{name}")]
    assert len(expected) >= 2
    assert [row["loss"] for row in steps(many[0], f"run-{name}")] == pytest.approx(expected, rel=1e-4)


@of(["sgd", "focal"])
def test_parameters_after_training(one: Result, many: Result, name: str) -> None:
    """Of SGD only: adaptive optimizers divide by the gradient's size, and so make much of its rounding."""
    expected = one[1][0][name]["parameters"]
    for result in many[1]:
        assert (result[name]["parameters"] - expected).norm() / expected.norm() < 1e-5


def test_evaluations_are_exact(one: Result, many: Result) -> None:
    """For every n, also if a process has no image."""
    for n, alone in one[1][0]["evaluations"].items():
        assert len(alone["target"]) == int(n)
        for result in many[1]:
            found = result["evaluations"][n]
            assert torch.equal(found["target"], alone["target"])
            assert torch.equal(found["classes"], alone["classes"])
            torch.testing.assert_close(found["loss"], alone["loss"], rtol=1e-5, atol=1e-7)


def test_scores_of_the_best_checkpoint_are_equal_on_every_process(one: Result, many: Result) -> None:
    expected = one[1][0]["sgd"]["best"]
    for result in many[1]:
        best = result["sgd"]["best"]
        assert best == many[1][0]["sgd"]["best"]
        assert best["epoch"] == expected["epoch"] and best["score"]["top1"] == expected["score"]["top1"]


def test_average_of_the_weights_follows_the_statistics_of_its_process(one: Result, many: Result) -> None:
    """Against the formula: wrapping for several processes must not leave the average with old buffers."""
    for result in (*one[1], *many[1]):
        assert result["statistics"]["off"] < 1e-6


@pytest.mark.parametrize("many", [2], indirect=True)
def test_gradients_copied_at_once_have_the_same_bits(many: Result) -> None:
    """As on GPUs, where torch can; with two processes, because with three torch rounds the mean in another way."""
    can = "batched_grad_copy" in inspect.signature(DistributedDataParallel).parameters
    for result in many[1]:
        for accumulate in "12":
            at_once, one_by_one = (result["copies"][f"{accumulate} {flag}"] for flag in (True, False))
            assert (at_once["flags"], one_by_one["flags"]) == ([can], [False])
            assert one_by_one["gradient"].abs().max() > 0
            for name in ("gradient", "parameters"):
                assert torch.equal(at_once[name], one_by_one[name])


def test_images_spread_over_the_processes_have_the_same_bits(many: Result) -> None:
    """Each process keeps a part of the images; what the network gets and what it learns stays the same."""
    kept = [result["spread"]["spread"]["pixels"] for result in many[1]]
    for result in many[1]:
        whole, spread = result["spread"]["whole"], result["spread"]["spread"]
        line = f"training images are spread over {len(many[1])} devices, because they take more than half of"
        assert line in spread["said"]
        assert sum(kept) == whole["pixels"] and max(kept) < whole["pixels"]
        assert len(whole["inputs"]) == 3 * GLOBAL_BATCH // len(many[1])
        assert torch.equal(spread["inputs"], whole["inputs"])
        assert torch.equal(spread["parameters"], whole["parameters"])


def test_statistics_are_averaged_inside_the_context_and_restored_after_it(many: Result) -> None:
    own = [result["statistics"]["own"] for result in many[1]]
    assert not torch.equal(own[0], own[1]), "each process was to see other images"
    for result in many[1]:
        torch.testing.assert_close(result["statistics"]["mean"], torch.stack(own).mean(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(result["statistics"]["after"], result["statistics"]["own"])


@pytest.mark.parametrize("recipe", ["head-then-all", "gradual-unfreeze"])
def test_phases_keep_processes_in_step(many: Result, recipe: str) -> None:
    for result in many[1]:
        assert torch.equal(result["phases"][recipe], many[1][0]["phases"][recipe])


def test_processes_out_of_step_are_noticed_by_all(many: Result) -> None:
    for result in many[1]:
        assert "layer2.0.conv1.weight" in result["phases"]["noticed"]
