"""Pictures: nothing is cut off at the edge of the file, whatever is drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.evaluation.reliability import Reliability
from resnet_dist.report import plots

EPOCHS = [
    {"epoch": n, "phase": n, "train_loss": 1 / n, "val_loss": 2 / n, "train_top1": 0.5, "val_top1": 0.123456}
    for n in (1, 2)
]
BINS = Reliability(np.arange(15), np.linspace(0, 1, 15), np.linspace(1, 0, 15))
LONG = [name * 30 for name in "abcdefg"]


def _confusion(names: list[str]) -> Callable[[Path], None]:
    return lambda file: plots.confusion_matrix(file, 10 * np.eye(len(names), dtype=int), names)


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(_confusion(["ants", "bees"]), id="confusion of two classes"),
        pytest.param(_confusion(["cats", "dogs", "fish"]), id="confusion of three classes"),
        pytest.param(_confusion(LONG[:3]), id="confusion of long names"),
        pytest.param(_confusion(LONG), id="confusion of turned names"),
        pytest.param(_confusion([str(n) for n in range(40)]), id="confusion of forty classes"),
        pytest.param(lambda file: plots.curves(file, EPOCHS), id="curves"),
        pytest.param(
            lambda file: plots.learning_rates(file, [{"step": n, "lr": {"head": 1e-3, LONG[0]: 1e-5}} for n in (1, 2)]),
            id="learning rates",
        ),
        pytest.param(
            lambda file: plots.lr_range(file, [1e-5, 1e-3, 0.1], [2, 1, 9], [2, 1, 4], {"minimum": 1e-3}), id="lr range"
        ),
        pytest.param(lambda file: plots.compared_curves(file, {name: [EPOCHS] for name in LONG}), id="comparison"),
        pytest.param(lambda file: plots.reliability_diagram(file, BINS), id="reliability"),
        pytest.param(
            lambda file: plots.embedding_map(file, np.eye(20, dtype=np.float32), np.arange(20) % 7, LONG), id="map"
        ),
    ],
)
def test_no_part_of_a_plot_is_cut_off(tmp_path: Path, draw: Callable[[Path], None]) -> None:
    draw(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.min() < 128, "nothing was drawn"
    for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (side == 255).all()
