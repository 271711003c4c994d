"""Pictures: nothing is cut off at the edge of the file, whatever is drawn."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from now on, in place of files."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, file, dpi: figures.append(figure))
    return figures


@pytest.mark.parametrize("n", [1, 2, 10, 102])
def test_confusion_matrix_names_every_class_on_both_axes(drawn: list[Figure], n: int) -> None:
    names = [f"kind {number}" for number in range(n)]
    plots.confusion_matrix(Path("any.png"), np.eye(n, dtype=int), names)
    axes = drawn[0].axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == names
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_confusion_matrix_of_a_thousand_classes_has_numbers_and_a_key(drawn: list[Figure], tmp_path: Path) -> None:
    """In the real file, a single mistake is a pixel that is as dark as its share."""
    counts = 9 * np.eye(1000, dtype=int)
    counts[500, 20] = 9  # half of the row
    plots.confusion_matrix(tmp_path / "plot.png", counts, [f"kind {number}" for number in range(1000)])
    axes = drawn[0].axes[0]
    assert axes.get_title() == "1,000 classes, numbered from 0 in the order of per_class.csv"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    stream = BytesIO()
    drawn[0].savefig(stream, dpi=100)
    pixels = np.asarray(Image.open(stream).convert("RGB")).astype(int)
    left, top = axes.transData.transform((20, 500)).round().astype(int)
    cell = pixels[pixels.shape[0] - top - 1, left]
    wanted = np.array(colormaps["Blues"](0.5)[:3]) * 255
    assert np.abs(cell - wanted).max() < 3


@pytest.mark.parametrize(
    ("accuracy", "confidence", "kinds"),
    [
        ([0.2, 0.9], [0.5, 0.6], ["overconfident", "underconfident"]),
        ([0.2, 0.3], [0.5, 0.6], ["overconfident"]),
        ([0.8, 0.9], [0.5, 0.6], ["underconfident"]),
    ],
)
def test_legend_of_the_reliability_diagram_has_the_colours_of_the_plot(
    drawn: list[Figure], accuracy: list[float], confidence: list[float], kinds: list[str]
) -> None:
    bins = np.full((3, 15), np.nan)
    bins[0], bins[0, [7, 8]], bins[1, [7, 8]], bins[2, [7, 8]] = 0, 4, confidence, accuracy
    plots.reliability_diagram(Path("any.png"), Reliability(*bins))
    (legend,) = drawn[0].legends
    keys = {
        text.get_text().partition(":")[0]: handle
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert set(keys) == {"accuracy", "accuracy = confidence", *kinds}
    for bar in drawn[0].axes[0].patches:
        assert isinstance(bar, Rectangle)
        at = round((bar.get_x() + bar.get_width() / 2) * 15 - 0.5) - 7
        low, high = sorted((accuracy[at], confidence[at]))
        if bar.get_hatch():
            assert (bar.get_y(), bar.get_y() + bar.get_height()) == pytest.approx((low, high))
            kind = "overconfident" if accuracy[at] < confidence[at] else "underconfident"
        else:
            assert (bar.get_y(), bar.get_height()) == (0, pytest.approx(accuracy[at]))
            kind = "accuracy"
        key = keys[kind]
        assert isinstance(key, Rectangle) and key.get_hatch() == bar.get_hatch()
        assert (key.get_facecolor(), key.get_edgecolor()) == (bar.get_facecolor(), bar.get_edgecolor())


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
