"""The demo's settings. `.ci/wheel` runs it to the end, and checks its accuracy and its files."""

from pathlib import Path

import pytest

from resnet_dist.cli.main import main
from resnet_dist.config.schema import TrainConfig
from resnet_dist.training import demo


@pytest.mark.parametrize(
    ("arguments", "side", "epochs"), [([], 32, 3), (["--full"], 64, 6), (["--full", "--epochs", "1"], 64, 1)]
)
def test_the_short_and_the_full_demo(
    arguments: list[str], side: int, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrainConfig] = []
    monkeypatch.setattr(demo, "run_training", asked.append)
    monkeypatch.setattr(demo, "export_and_predict", lambda *_: None)
    assert main(["demo", "-o", str(tmp_path), *arguments]) == 0
    (cfg,) = asked
    assert list(cfg.problems()) == []
    assert (cfg.preprocess.img_size, cfg.run.epochs) == (side, epochs)
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 1797
