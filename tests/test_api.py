"""The Python API: what is public, that it is lazy, quiet and leaves nothing behind, and that it is the command line."""

import ast
import hashlib
import inspect
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import resnet_dist as rd
from tests.conftest import TINY

SMALL: dict[str, Any] = {
    "model": "resnet18",
    "weights": "none",
    "stem": "small",
    "img_size": 16,
    "workers": 0,
    "threads": 1,
    "mixed_precision": "no",
    "report": False,
    "epochs": 2,
    "batch_size": 8,
}
AS_OPTIONS = [*TINY, "--epochs", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> rd.Run:
    """A finished run; not to be changed by a test."""
    run = rd.train(folder, **SMALL, output_dir=tmp_path_factory.mktemp("api") / "run")
    assert run is not None
    return run


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# What is public


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in rd.__all__:
        assert getattr(rd, name) is not None, name
    assert set(rd.__all__) == {*rd._PLACES, "__version__"}
    assert dir(rd) == sorted(rd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = rd.trian


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(rd.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == rd._PLACES
    assert (Path(str(rd.__file__)).parent / "py.typed").exists()


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, resnet_dist as rd; rd.train, rd.lr_find, rd.compare, rd.check, rd.Run; print(sorted(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "torchvision", "numpy", "accelerate", "rich", "PIL"} & set(ast.literal_eval(loaded))


def test_public_functions_have_a_docstring_and_name_their_errors() -> None:
    functions = [getattr(rd, name) for name in rd.__all__ if name[0].islower()]
    assert [f.__name__ for f in functions if "Raises" not in (f.__doc__ or "")] == []


def test_signatures_show_the_options() -> None:
    for function in (rd.train, rd.lr_find, rd.compare, rd.evaluate):
        names = list(inspect.signature(function).parameters)
        assert names[0] in ("data", "run") and {"verbose", "batch_size", "output_dir"} <= set(names), function
    assert not {"recipe", "resume", "overwrite"} & set(inspect.signature(rd.compare).parameters)


# What a training does, and does not


def test_a_run_is_what_its_folder_says(run: rd.Run, folder: Path) -> None:
    assert run.status == "done" and run.best.is_file() and Path(run) == run.path
    assert run.metrics["top1"].low <= run.metrics["top1"].value <= run.metrics["top1"].high
    assert [row["epoch"] for row in run.epochs] == [1, 2]
    assert run.config["run"]["epochs"] == 2 and run.facts["data_root"] == str(folder)
    assert rd.load_run(run.path) == run
    command = (run.path / "command.txt").read_text()
    assert command.startswith(f"resnet_dist.train(data='{folder}', model='resnet18'") and "seed" not in command


def test_results_are_displayed_in_a_notebook(run: rd.Run) -> None:
    shown = run._repr_html_()
    assert "<table>" in shown and str(run.path) in shown and str(run.metrics["top1"]) in shown


def test_a_run_that_is_not_done_has_no_metrics(run: rd.Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "failed", "epochs": 1, "data_root": "x"}')
    failed = rd.load_run(tmp_path)
    assert (failed.status, failed.metrics, failed.epochs) == ("failed", {}, [])
    assert "failed" in failed._repr_html_()
    with pytest.raises(rd.UsageError, match="not a run folder"):
        rd.load_run(tmp_path / "none")


def test_the_checkpoint_is_a_plain_module(run: rd.Run) -> None:
    checkpoint = rd.load_checkpoint(run)
    model, classes, preprocessing = rd.load_checkpoint(run.best)
    assert classes == checkpoint.classes == ("cat", "dog", "emu") and preprocessing.img_size == 16
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3) and not model.training
    with pytest.raises(rd.ArtifactError):
        rd.load_checkpoint(run.path / "run.json")


def test_functions_print_nothing_without_verbose(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert rd.train(folder, **SMALL, output_dir=tmp_path / "run", dry_run=True) is None
    assert capfd.readouterr() == ("", "")
    rd.train(folder, **SMALL, output_dir=tmp_path / "run", dry_run=True, verbose=True)
    assert "3 classes, 24 training and 15 validation images" in capfd.readouterr().out


def test_errors_can_be_caught_and_name_keywords(folder: Path, tmp_path: Path, run: rd.Run) -> None:
    with pytest.raises(rd.UsageError) as caught:
        rd.train(folder, epochs=-1, batch_sise=8, sched="cosin")
    assert len(caught.value.problems) == 3 and "--" not in str(caught.value)
    assert "epochs=-1: must be at least 1" in caught.value.problems
    with pytest.raises(rd.UsageError, match="output_dir="):
        rd.train(folder, **SMALL, output_dir=run.path)
    with pytest.raises(rd.DataError):
        rd.train(tmp_path, **SMALL, output_dir=tmp_path / "run")
    assert all(issubclass(getattr(rd, name), rd.ResnetDistError) for name in rd.__all__ if name.endswith("Error"))


def process_state() -> dict[str, Any]:
    """What a training could leave behind in its process."""
    return {
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "accelerate": dict(AcceleratorState._shared_state),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "python threads": sorted(thread.name for thread in threading.enumerate()),
        "processes": torch.multiprocessing.active_children(),
    }


def test_two_trainings_in_one_process_are_as_two_processes(run: rd.Run, folder: Path, tmp_path: Path) -> None:
    """And the function trains what the command trains, bit for bit."""
    arguments = ["train", str(folder), *AS_OPTIONS, "--seed", "1", "-o", str(tmp_path / "command")]
    subprocess.run([sys.executable, "-m", "resnet_dist", *arguments], check=True, capture_output=True, timeout=300)
    torch.manual_seed(123)
    before = process_state()
    second = rd.train(folder, **SMALL, seed=1, output_dir=tmp_path / "function")
    assert process_state() == before
    assert second is not None and digest(second.best) != digest(run.best)
    assert digest(second.best) == digest(tmp_path / "command/checkpoints/best.safetensors")


def test_it_trains_in_a_thread_and_a_finished_run_is_returned(run: rd.Run) -> None:
    """Where no signal can be handled."""
    found: list[rd.Run | None] = []
    thread = threading.Thread(target=lambda: found.append(rd.train(resume=run.path)))
    thread.start()
    thread.join()
    assert found == [run]


def test_a_data_set_is_checked_and_split(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = rd.split(folder / "train", tmp_path / "parts.csv", val=0.25)
    assert done.counts == {"train": 18, "val": 6} and done.classes == 3 and "<table>" in done._repr_html_()
    report = rd.check(done, cache=False)
    assert report.ok and report.facts["images"] == 24 and not report.duplicates and "<table>" in report._repr_html_()
    assert capfd.readouterr() == ("", "")
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("no image")
    assert len(rd.check(tmp_path / "texts", cache=False, verbose=True).errors) == 4
    assert "4 images, 4 that cannot be used" in capfd.readouterr().out
    with pytest.raises(rd.UsageError, match="val=2: must be at least 0 and at most 1"):
        rd.split(folder / "train", tmp_path / "more.csv", val=2.0)


def test_what_lr_find_suggests_can_be_given_to_train(folder: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 1, "sched": "constant"}
    found = rd.lr_find(folder, **settings, steps=10, lr_start=1e-5, lr_end=1.0, output_dir=tmp_path / "rates")
    assert len(found.test.rates) == len(found.test.losses) > 0 and "<table>" in found._repr_html_()
    for name, rate in found.suggested.items():
        assert found.settings[name]["lr"] == pytest.approx(rate)
        assert rd.train(folder, **settings, **found.settings[name], output_dir=tmp_path / "run", dry_run=True) is None


def test_techniques_are_compared(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = {**SMALL, "epochs": 1, "output_dir": tmp_path / "both"}
    comparison = rd.compare(folder, recipes=["feature-extractor", "bn-only"], **settings)
    assert capfd.readouterr() == ("", "")
    assert comparison is not None and {t.name for t in comparison.techniques} == {"feature-extractor", "bn-only"}
    assert len(comparison.pairs) == 1 and "<table>" in comparison._repr_html_()
    assert (tmp_path / "both/compare.md").read_text().count(comparison.lines()[0]) == 1
    ours = [rd.load_run(path) for paths in comparison.runs.values() for path in paths]
    again = rd.compare(runs=ours, output_dir=tmp_path / "again")
    assert again is not None and [t.top1 for t in again.techniques] == [t.top1 for t in comparison.techniques]
    with pytest.raises(rd.UsageError, match="recipe: compare takes recipes"):
        rd.compare(folder, recipe="bn-only")


def test_a_run_is_evaluated(run: rd.Run, capfd: pytest.CaptureFixture[str]) -> None:
    evaluation = rd.evaluate(run, save=False, workers=0, threads=1)
    assert {name: m.value for name, m in evaluation.metrics.items()} == {n: m.value for n, m in run.metrics.items()}
    assert capfd.readouterr() == ("", "")


def to_size(image: torch.Tensor) -> torch.Tensor:
    return image[:, :16, :16].clone()


def test_a_transform_of_the_user(folder: Path, tmp_path: Path) -> None:
    """It is recorded; the run is resumed only with one, and it takes the place of what `aug` does."""
    settings = {**SMALL, "save_every": "1epochs", "output_dir": tmp_path / "run"}
    run = rd.train(folder, train_transform=to_size, **settings)
    assert run is not None and run.status == "done"
    assert run.facts["train_transform"] == "tests.test_api.to_size" and run.config["augment"]["aug"] == "custom"
    with pytest.raises(rd.UsageError, match="needs a transform that is given in Python"):
        rd.train(resume=run, epochs=3)
    more = rd.train(resume=run, epochs=3, train_transform=to_size)
    assert more is not None and [row["epoch"] for row in more.epochs] == [1, 2, 3]
    with pytest.raises(rd.UsageError, match="hflip: train_transform replaces it"):
        rd.train(folder, train_transform=to_size, hflip=0.0)
    with pytest.raises(rd.DataError, match="train_transform must return a uint8 tensor"):
        rd.train(folder, train_transform=lambda image: image / 255, **{**settings, "overwrite": True})
