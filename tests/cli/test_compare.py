"""`resnet-dist compare` on images small enough for seconds: what it trains, what it keeps, what it says."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from resnet_dist.cli.main import main
from resnet_dist.training.comparison import SIX
from tests.conftest import TINY

Refused = Callable[..., str]
SHORT = [
    *TINY,
    "--batch-size",
    "12",
    "--epochs",
    "1",
    "--save-every",
    "1steps",
    "--recipes",
    "bn-only,feature-extractor",
    "--seeds",
    "2",
]


@pytest.fixture(scope="module")
def compared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes with two seeds each; not to be changed by a test."""
    path = tmp_path_factory.mktemp("compare") / "out"
    assert main(["compare", str(folder), *SHORT, "-o", str(path)]) == 0
    return path


def copied(run: Path, place: Path) -> Path:
    """A copy that may be changed: its weights, which are replaced but never written into, are the same files."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    return Path(shutil.copytree(run, place, copy_function=copy))


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def predictions(run: Path) -> tuple[list[str], list[str]]:
    table = rows(run / "eval/val/predictions.csv")
    return [row["target"] for row in table], [row["prediction"] for row in table]


def test_table_is_what_the_runs_predicted(compared: Path) -> None:
    """Mean, interval and macro-F1 from the predictions of every run, by scikit-learn and scipy."""
    table = rows(compared / "compare.csv")
    assert sorted(row["technique"] for row in table) == ["bn-only", "feature-extractor"]
    for row in table:
        runs = [predictions(compared / row["technique"] / f"seed-{seed}") for seed in (0, 1)]
        top1 = [accuracy_score(*run) for run in runs]
        low, high = stats.t.interval(0.95, 1, np.mean(top1), stats.sem(top1)) if top1[0] != top1[1] else (top1[0],) * 2
        assert float(row["top1"]) == pytest.approx(np.mean(top1))
        assert float(row["low"]) == pytest.approx(max(0, low))
        assert float(row["high"]) == pytest.approx(min(1, high))
        assert float(row["macro_f1"]) == pytest.approx(np.mean([f1_score(*run, average="macro") for run in runs]))
        assert float(row["minutes"]) > 0 and int(row["peak_mib"]) > 100
    assert float(table[0]["top1"]) >= float(table[1]["top1"])
    learning = {row["technique"]: int(row["trainable_parameters"]) for row in table}
    # resnet18's BatchNorm: stem 2x64; per stage four layers of its width and, in three, one in the shortcut.
    assert learning["bn-only"] == 2 * (64 + 4 * 64 + 5 * 128 + 5 * 256 + 5 * 512) + 3 * 513
    assert learning["feature-extractor"] == 3 * 513


def test_written_files_agree_with_the_comparison(compared: Path) -> None:
    facts = json.loads((compared / "compare.json").read_text())
    text = (compared / "compare.md").read_text()
    (pair,) = facts["pairs"]
    verdict = "real" if pair["p_corrected"] < 0.05 else "noise"
    assert facts["images"] == 15 and pair["p_corrected"] == pair["p"]
    assert f"Best: {pair['better']}" in text and f"behind: {verdict} (p = " in text
    assert pair["images_for_better"] + pair["images_for_worse"] <= 15
    with Image.open(compared / "compare.png") as image:
        assert image.size[0] > 600 and len(image.convert("RGB").getcolors(1 << 20) or []) > 50


def test_finished_comparison_trains_nothing_and_interrupted_one_continues(
    compared: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run is put back to where a signal would have left it, one is taken away, a finished one is added."""
    copy, other = copied(compared, tmp_path / "out"), copied(compared / "bn-only/seed-0", tmp_path / "other")
    table = (copy / "compare.csv").read_text().splitlines()
    cut = copy / "bn-only/seed-1"
    facts = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**facts, "status": "preempted"}))
    shutil.rmtree(sorted((cut / "checkpoints").glob("step-*"))[-1])
    shutil.rmtree(copy / "feature-extractor/seed-1")
    kept = copy / "bn-only/seed-0/checkpoints/best.safetensors"
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    assert main(["compare", str(folder), *SHORT, "--runs", str(other), "-o", str(copy)]) == 0
    said = capsys.readouterr().out
    assert said.count("this run is complete") == 2 and said.count("resuming") == 1
    assert kept.stat().st_mtime_ns == before
    again = (copy / "compare.csv").read_text().splitlines()
    own = [line for line in again if not line.startswith(str(other))]
    assert len(own) == len(again) - 1 == len(table)
    for old, new in zip(table, own, strict=True):
        assert old.split(",")[:6] == new.split(",")[:6]


def test_other_options_in_the_same_folder_are_refused(compared: Path, folder: Path, refused: Refused) -> None:
    said = refused(2, "compare", folder, *SHORT, "-o", compared, "--lr", "0.5")
    assert "bn-only was begun there with other options (lr 0.001 -> 0.5)" in said
    assert main(["compare", str(folder), *SHORT, "-o", str(compared), "--workers", "1", "--dry-run"]) == 0


def test_finished_runs_are_grouped_by_their_settings(compared: Path, tmp_path: Path) -> None:
    runs = [str(compared / name / f"seed-{seed}") for name in ("bn-only", "feature-extractor") for seed in (0, 1)]
    assert main(["compare", "--runs", ",".join(runs), "-o", str(tmp_path / "out")]) == 0
    new, old = rows(tmp_path / "out/compare.csv"), rows(compared / "compare.csv")
    assert [row["seeds"] for row in new] == ["2", "2"]
    assert [row["top1"] for row in new] == [row["top1"] for row in old]


def test_runs_that_cannot_be_compared(compared: Path, tmp_path: Path, refused: Refused) -> None:
    run, out = compared / "bn-only/seed-0", ("-o", tmp_path / "out")
    assert "not a run folder" in refused(2, "compare", "--runs", tmp_path / "none", *out)
    finished = compared / "bn-only" / "seed-0"
    for again in (f"{finished}/", f"{finished}/../seed-0"):
        said = refused(2, "compare", "--runs", f"{finished},{again}", *out)
        assert "the same run as" in said and "would count twice" in said
    running = copied(run, tmp_path / "running")
    facts = json.loads((running / "run.json").read_text())
    (running / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    assert "this run is not finished" in refused(2, "compare", "--runs", running, *out)
    damaged = copied(run, tmp_path / "damaged")
    (damaged / "eval/val/predictions.csv").write_text("path,prediction\nx,y\n")
    assert "missing or damaged" in refused(6, "compare", "--runs", damaged, *out)
    other = copied(run, tmp_path / "other")
    table = other / "eval/val/predictions.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-3]))
    said = refused(2, "compare", "--runs", f"{run},{other}", *out)
    assert "have different validation images (3 differ, such as" in said


def test_options_that_compare_refuses(folder: Path, refused: Refused) -> None:
    assert "compare takes --recipes x" in refused(2, "compare", folder, "--recipe", "x")
    assert "goes on by itself" in refused(2, "compare", folder, "--resume", "x")
    assert "replaces nothing" in refused(2, "compare", folder, "--overwrite")
    assert "--output-dir is missing" in refused(2, "compare", "--runs", "x")
    assert "DATA is missing" in refused(2, "compare")
    said = refused(2, "compare", folder, "--recipes", "nope,bn-onli", "--epochs", "0").splitlines()
    assert len(said) == len(set(said)) == 3


def test_a_run_that_diverges_is_left_out(compared: Path, folder: Path, tmp_path: Path, refused: Refused) -> None:
    out, finished = tmp_path / "out", compared / "bn-only/seed-0"
    options = [*TINY, "--batch-size", "12", "--epochs", "2", "--recipes", "full-finetune", "--lr", "1e30"]
    said = refused(5, "compare", folder, *options, "--runs", finished, "-o", out)
    assert f"{out / 'full-finetune/seed-0'} is left out: " in said
    assert [row["technique"] for row in rows(out / "compare.csv")] == [str(finished)]


def test_the_six_techniques_are_the_default(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(folder), *TINY, "-b", "12", "--dry-run", "-o", str(tmp_path / "out")]) == 0
    plans = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resnet18, ")]
    assert len(plans) == len(SIX) == 6 and not (tmp_path / "out").exists()
