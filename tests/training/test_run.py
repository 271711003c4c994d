"""`resnet-dist train` from the command line to the run folder, on images small enough for seconds."""

import csv
import dataclasses
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss

from resnet_dist.cli.main import main
from resnet_dist.config.recipes import layers
from resnet_dist.data.loader import Share, TrainBatches
from resnet_dist.model.batch_norm import Sync
from tests.conftest import CLASSES, TINY, WITH_REPORT, make_folder
from tests.training.helpers import job_of

LENGTH = ["--epochs", "2", "--batch-size", "8", "--lr", "0.02"]
SHORT = [*TINY, *LENGTH]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed by a test."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", str(folder), *WITH_REPORT, *LENGTH, "-o", str(path), "--ema", "--log-every", "1"]) == 0
    return path


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_run_folder_holds_what_is_promised(run: Path) -> None:
    names = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    promised = """run.json config.toml command.txt classes.txt preprocess.json metrics.csv metrics.jsonl train.log
        checkpoints/best.safetensors data/manifest.csv eval/val/predictions.csv eval/val/metrics.json
        eval/val/per_class.csv plots/curves.png plots/lr.png plots/confusion_matrix.png plots/samples_train.png
        plots/predictions.png"""
    assert set(promised.split()) <= names
    assert not [name for name in names if ".tmp" in name]
    facts = json.loads((run / "run.json").read_text())
    assert (facts["status"], facts["exit_code"]) == ("done", 0)
    assert (run / "classes.txt").read_text().split() == list(CLASSES)
    for picture in (run / "plots").glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200 and np.asarray(image).std() > 5, picture


def test_metrics_files(run: Path) -> None:
    epochs = rows(run / "metrics.csv")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert float(epochs[0]["train_loss"]) == pytest.approx(np.mean([s["loss"] for s in steps[:3]]), rel=1e-5)
    assert set(steps[0]["lr"]) >= {"stem", "layer1", "layer2", "layer3", "layer4", "head"}


def test_predictions_hold_every_metric(run: Path) -> None:
    """Every number of metrics.json, by scikit-learn from predictions.csv alone."""
    records = rows(run / "eval/val/predictions.csv")
    metrics = json.loads((run / "eval/val/metrics.json").read_text())
    target, predicted = [r["target"] for r in records], [r["prediction"] for r in records]
    by_class = [{r[f"top{k}"]: float(r[f"p{k}"]) for k in (1, 2, 3)} for r in records]
    probabilities = np.array([[row[name] for name in CLASSES] for row in by_class])
    probabilities /= probabilities.sum(1, keepdims=True)
    assert metrics["images"] == len(records) == 15
    assert metrics["top1"] == pytest.approx(accuracy_score(target, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(target, predicted, average="macro"))
    assert metrics["loss"] == pytest.approx(log_loss(target, probabilities), rel=1e-4)
    assert metrics["top5"] == 1.0, "there are three classes"
    for record in records:
        assert record["prediction"] == record["top1"]
        assert float(record["p1"]) >= float(record["p2"]) >= float(record["p3"])


def test_eval_gives_what_train_wrote(run: Path, folder: Path, tmp_path: Path) -> None:
    """By run, by run and data, and by checkpoint and data: the same file of predictions."""
    expected = (run / "eval/val/predictions.csv").read_text()
    assert main(["eval", str(run), "-o", str(tmp_path / "a")]) == 0
    assert main(["eval", str(run), str(folder), "-o", str(tmp_path / "b"), "--batch-size", "4"]) == 0
    best = str(run / "checkpoints/best.safetensors")
    assert main(["eval", best, str(folder / "val"), "-o", str(tmp_path / "c")]) == 0
    assert (tmp_path / "a/predictions.csv").read_text() == expected
    for other, prefix in (("b", ""), ("c", "val/")):
        found = rows(tmp_path / other / "predictions.csv")
        for new, old in zip(found, rows(run / "eval/val/predictions.csv"), strict=True):
            assert prefix + new["path"] == old["path"]
            assert new["prediction"] == old["prediction"]
            assert float(new["p1"]) == pytest.approx(float(old["p1"]), rel=1e-4)


def test_written_config_repeats_the_run(run: Path, tmp_path: Path) -> None:
    """The written config alone repeats the run: the same best checkpoint, byte for byte."""
    again = tmp_path / "again"
    assert main(["train", "-c", str(run / "config.toml"), "-o", str(again)]) == 0
    best = "checkpoints/best.safetensors"
    assert (again / best).read_bytes() == (run / best).read_bytes()
    assert (again / "config.toml").read_text() == (run / "config.toml").read_text()


def test_dry_run_prints_the_plan_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--recipe", "discriminative", "--epochs", "3", "--batch-size", "8", "-o", str(tmp_path / "x")]
    assert main(["train", str(folder), *options, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "phase 1: 1 epoch, 3 steps; learns 'head', 1,539 of" in said
    assert "phase 2: 2 epochs, 6 steps; learns 'all'" in said
    assert "lr stem=1e-05 layer1=1e-05 layer2=1e-05 layer3=1e-05 layer4=1e-05 head=0.001" in said
    assert "global batch 8" in said and "statistics update" in said
    assert not (tmp_path / "x").exists()


def test_plan_says_that_batch_norm_depends_on_the_number_of_processes(folder: Path, tmp_path: Path) -> None:
    plan = job_of(tmp_path / "x", folder, *TINY, "--batch-size", "8").plan
    two = dataclasses.replace(plan, batches=TrainBatches(24, 0, Share(8, 1, 2, 0), drop_last=False))
    synchronised = dataclasses.replace(two, sync_bn=Sync(True, "--sync-bn"))
    frozen = dataclasses.replace(two, phases=tuple(dataclasses.replace(p, updating=()) for p in two.phases))
    said = [[line for line in one.lines() if "of each process" in line] for one in (plan, two, synchronised, frozen)]
    assert [len(lines) for lines in said] == [0, 1, 0, 0]
    assert said[1][0].startswith("WARNING: BatchNorm takes its statistics from the 8 images of each process")


def test_plan_names_the_test_images_and_warns_of_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data")  # 24 training images: 3 steps of 8 per epoch
    shutil.copytree(data / "val", data / "test")
    dry = ["train", str(data), *TINY, "--batch-size", "8", "--dry-run"]
    assert main([*dry, "--epochs", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "3 classes, 24 training and 15 validation images",
        "15 test images: not used in training or to choose; `resnet-dist eval RUN --split test` evaluates them",
    ]
    assert lines[-1].startswith("WARNING: only 18 optimizer steps in all, too few to learn much")
    shutil.rmtree(data / "test")
    assert main([*dry, "--epochs", "7"]) == 0
    said = capsys.readouterr().out
    assert "test image" not in said and "WARNING" not in said


IN_EVERY_SUITE = ("bn-only", "cifar10-from-scratch", "deep-head", "feature-extractor-bn-eval", "gradual-unfreeze")


@pytest.mark.parametrize(
    "name", [name if name in IN_EVERY_SUITE else pytest.param(name, marks=pytest.mark.matrix) for name in layers()]
)
def test_every_recipe_runs(name: str, folder: Path, tmp_path: Path) -> None:
    """Each recipe trains as it is, but on a tiny network and for as few epochs as it has phases."""
    phases = len(layers()[name]["phase"])
    options = ["--epochs", str(phases), "--batch-size", "12"]
    for number in range(1, phases):
        options += ["--phase", f"{number}.epochs=1"]
    assert main(["train", str(folder), "--recipe", name, *TINY, *options, "-o", str(tmp_path / "run")]) == 0
    config = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert config["recipe"] == name
    epochs = rows(tmp_path / "run/metrics.csv")
    assert [int(row["phase"]) for row in epochs] == list(range(1, phases + 1))


def test_resume_from_the_middle_of_an_epoch_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    """With augmentation, MixUp, dropout, an average and another number of loader processes."""
    options = ["--head", "mlp", "--dropout", "0.3", "--mixup", "0.4", "--aug", "trivial", "--ema", "--opt", "adam"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    saving = ["--save-every", "2steps", "--keep-last", "9", "--log-every", "1"]
    assert main(["train", str(folder), *SHORT, *options, *saving, "-o", str(whole)]) == 0
    # Six steps: the state after step 2 lies in the middle of the first epoch. Everything later is taken away.
    shutil.copytree(whole, cut)
    for later in ("step-000000004", "step-000000006"):
        shutil.rmtree(cut / "checkpoints" / later)
    (cut / "checkpoints/best.safetensors").unlink()
    facts = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**facts, "status": "failed"}))
    assert main(["train", "--resume", str(cut), "--workers", "2"]) == 0
    best = "checkpoints/best.safetensors"
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    last = "checkpoints/step-000000006/state.safetensors"
    assert (cut / last).read_bytes() == (whole / last).read_bytes()
    a, b = load_file(cut / best), load_file(whole / best)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_of_a_finished_run_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert main(["train", "--resume", str(run)]) == 0
    assert "complete" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_resume_refuses_another_run(run: Path, folder: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused(2, "train", "--resume", run, "--model", "resnet34", "--seed", "5", "--epochs", "3")
    assert "--model resnet18 -> resnet34" in said and "--seed 0 -> 5" in said
    grown = tmp_path / "grown"
    shutil.copytree(folder, grown)
    shutil.copy(grown / "train/cat/train000.png", grown / "train/cat/new.png")
    said = refused(2, "train", "--resume", run, "--data", grown, "--epochs", "3")
    assert "39 images then, 40 now" in said
    shutil.copytree(grown / "train/cat", grown / "train/yak")
    assert "with new yak" in refused(2, "train", "--resume", run, "--data", grown, "--epochs", "3")
    assert refused(2, "train", "--resume", run, "--recipe", "bn-only").count("keeps its recipe") == 1


def test_resume_auto_starts_from_the_beginning_without_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """A first attempt that died before its first checkpoint must not stand in the way of the next."""
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    images = {"train": 24, "val": 15, "test": 0}
    facts = {"status": "failed", "exit_code": 4, "epochs": 1, "data_root": str(folder), "images": images}
    (path / "run.json").write_text(json.dumps(facts))
    arguments = ["train", str(folder), *SHORT, "--epochs", "1", "-o", str(path), "--resume", "auto"]
    assert main(arguments) == 0
    assert json.loads((path / "run.json").read_text())["status"] == "done"
    assert main([*arguments[:-4], "-o", str(path), "--resume", "auto", "--epochs", "2"]) == 0
    assert [row["epoch"] for row in rows(path / "metrics.csv")] == ["1", "2"]


def test_a_used_folder_is_refused_and_overwrite_replaces_it(
    folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "run"
    arguments = ["train", str(folder), *SHORT, "--epochs", "1", "-o", str(path)]
    assert main(arguments) == 0
    assert "it contains a finished run; choose another folder, or give --overwrite" in refused(2, *arguments)
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads((path / "run.json").read_text())["status"] == "done"


def test_a_loss_that_is_not_finite_ends_the_run(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "run"
    said = refused(5, "train", folder, *SHORT, "--lr", "1e30", "--log-every", "1", "-o", path)
    assert "the loss became" in said and "lower --lr" in said
    facts = json.loads((path / "run.json").read_text())
    assert (facts["status"], facts["exit_code"]) == ("failed", 5)


def test_patience_ends_a_phase_only(folder: Path, tmp_path: Path) -> None:
    """With a rate of 0 only the first epoch is ever better: phase 1 ends after the second, phase 2 after its first."""
    path = tmp_path / "run"
    options = ["--recipe", "head-then-all", *TINY, "--lr", "0", "--epochs", "8", "--patience", "1", "-b", "12"]
    assert main(["train", str(folder), *options, "--batch-norm-stats", "frozen", "-o", str(path)]) == 2
    options += ["--phase", "1.batch_norm_stats=frozen", "--phase", "2.batch_norm_stats=frozen"]
    assert main(["train", str(folder), *options, "-o", str(path)]) == 0
    assert [row["phase"] for row in rows(path / "metrics.csv")] == ["1", "1", "2"]


def test_time_limit_ends_with_everything_written(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    options = ["--time-limit", "0.0001", "--epochs", "50", "--log-every", "1"]
    assert main(["train", str(folder), *SHORT, *options, "-o", str(path)]) == 0
    assert len(rows(path / "metrics.csv")) == 1
    assert json.loads((path / "run.json").read_text())["status"] == "done"
    assert "time limit" in (path / "train.log").read_text()


@pytest.mark.parametrize(("metric", "choose"), [("top1", max), ("loss", min), ("macro_f1", max)])
def test_best_goes_by_the_metric_and_its_direction(
    folder: Path, tmp_path: Path, metric: str, choose: Callable[[list[float]], float]
) -> None:
    path = tmp_path / "run"
    options = [*SHORT, "--epochs", "4", "--lr", "0.1", "--best-metric", metric]
    assert main(["train", str(folder), *options, "-o", str(path)]) == 0
    scores = [float(row[f"val_{metric}"]) for row in rows(path / "metrics.csv")]
    best = json.loads((path / "run.json").read_text())["best"]
    assert scores.index(choose(scores)) + 1 == best["epoch"]
    assert best[metric] == pytest.approx(choose(scores), rel=1e-4)


def test_average_with_the_best_score_is_saved_as_best(folder: Path, tmp_path: Path) -> None:
    """`weights` in run.json says which, and the checkpoint scores as that one did."""
    path = tmp_path / "run"
    assert main(["train", str(folder), *SHORT, "--ema", "--best-metric", "loss", "-o", str(path)]) == 0
    epochs = rows(path / "metrics.csv")
    best = json.loads((path / "run.json").read_text())["best"]
    losses = {kind: [float(row[f"{kind}_loss"]) for row in epochs] for kind in ("val", "ema")}
    kind = {"raw": "val", "ema": "ema"}[best["weights"]]
    assert best["loss"] == pytest.approx(losses[kind][best["epoch"] - 1], rel=1e-4)
    assert best["loss"] == pytest.approx(min(losses["val"] + losses["ema"]), rel=1e-4)


def test_one_folder_is_split_and_the_split_is_written(tmp_path: Path) -> None:
    from tests.conftest import make_folder

    data = make_folder(tmp_path / "data", train=10, val=0)
    path = tmp_path / "run"
    assert main(["train", str(data), *SHORT, "--epochs", "1", "--val-split", "0.3", "-o", str(path)]) == 0
    manifest = rows(path / "data/manifest.csv")
    assert len(manifest) == 30 and sum(row["split"] == "val" for row in manifest) == 9
    expected = sorted(row["path"] for row in manifest if row["split"] == "val")
    assert [row["path"] for row in rows(path / "eval/val/predictions.csv")] == expected
    assert main(["eval", str(path), "--split", "train"]) == 0
    assert len(rows(path / "eval/train/predictions.csv")) == 21
