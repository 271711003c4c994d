"""The end of a run: the best epoch's validation is the evaluation if it was as exact, and otherwise it is made."""

from pathlib import Path
from typing import Any

import pytest

from resnet_dist.cli.main import main
from resnet_dist.training import finish
from tests.conftest import TINY

LENGTH = ["--epochs", "2", "--batch-size", "8", "--lr", "0.02", "--eval-batch-size", "4"]
CASES: dict[str, tuple[list[str], int]] = {  # options, and how often the best checkpoint is evaluated
    "float32": (["--epochs", "1"], 0),
    "averaged weights": (["--ema"], 0),
    "features before the head": (["--recipe", "feature-extractor-bn-eval"], 0),
    "features before a stage": (["--phase", "1.trainable=head layer4", "--phase", "1.batch_norm_stats=frozen"], 1),
    "bf16": (["--mixed-precision", "bf16", "--epochs", "1"], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_closing_evaluation_is_that_of_the_best_checkpoint(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`eval` reads the checkpoint and the images again, and writes the same bytes."""
    options, expected = CASES[name]
    made: list[int] = []
    collect = finish.collect_records

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return collect(*arguments)

    monkeypatch.setattr(finish, "collect_records", counted)
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(["train", str(folder), *TINY, *LENGTH, *options, "-o", str(run)]) == 0
    assert len(made) == expected
    assert main(["eval", str(run), "-o", str(again), "-b", "4", "--workers", "0", "--threads", "1"]) == 0
    for file in ("predictions.csv", "per_class.csv"):
        assert (run / "eval/val" / file).read_text() == (again / file).read_text()
