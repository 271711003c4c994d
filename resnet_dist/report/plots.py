"""Plots as PNG files. Every function draws plain data."""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_dist.evaluation.reliability import BINS, Reliability
from resnet_dist.files.run import write_atomically
from resnet_dist.runtime.wording import shortened

GREEN, RED = "#1a7f37", "#cf222e"
NAMED = 150  # classes that the axes of the confusion matrix name; above, a name would be too small to read


def _figure(
    rows: int, columns: int, width: float, height: float, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def _save(figure: Figure, file: Path, dpi: int) -> None:
    """Write a PNG atomically. Raises MachineError.

    `bbox_inches="tight"`, which draws twice, is not needed: the constrained layout leaves room for everything.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, pil_kwargs={"compress_level": 3})
    write_atomically(file, stream.getvalue())


def curves(file: Path, epochs: Sequence[Mapping[str, float]]) -> None:
    """Loss and accuracy per epoch in training and validation; a dashed line marks the start of a phase."""
    figure, (left, right) = _figure(1, 2, 10, 4)
    x = [row["epoch"] for row in epochs]
    for axes, metric in ((left, "loss"), (right, "top1")):
        for kind, style in (("train", "o-"), ("val", "s-"), ("ema", "^-")):
            if f"{kind}_{metric}" in epochs[0]:
                axes.plot(x, [row[f"{kind}_{metric}"] for row in epochs], style, markersize=4, label=kind)
        for before, row in pairwise(epochs):
            if row["phase"] != before["phase"]:
                axes.axvline(row["epoch"] - 0.5, color="grey", linestyle="--", linewidth=1)
        axes.set(xlabel="epoch", ylabel={"loss": "loss", "top1": "top-1 accuracy"}[metric])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, file, 120)


def learning_rates(file: Path, steps: Sequence[Mapping[str, Any]]) -> None:
    """The learning rate of every parameter group per optimizer step, on a logarithmic axis."""
    figure, (axes,) = _figure(1, 1, 8, 4)
    names = list(dict.fromkeys(name for row in steps for name in row["lr"]))
    for name in names:
        axes.plot(
            [r["step"] for r in steps], [r["lr"].get(name, math.nan) for r in steps], ".-", markersize=3, label=name
        )
    axes.set(xlabel="optimizer step", ylabel="learning rate")
    if any(rate > 0 for row in steps for rate in row["lr"].values()):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file, 120)


def lr_range(
    file: Path,
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggested: Mapping[str, float],
) -> None:
    """Raw and smoothed loss over the learning rate, with a mark at each suggested rate."""
    figure, (axes,) = _figure(1, 1, 8, 4)
    axes.plot(rates, losses, color="grey", alpha=0.4, linewidth=1, label="loss")
    axes.plot(rates, smoothed, label="smoothed")
    for (name, rate), marker in zip(suggested.items(), "os", strict=False):
        axes.plot(rate, smoothed[list(rates).index(rate)], marker, markersize=9, label=f"{name}: {rate:.1e}")
    axes.set(xlabel="learning rate", ylabel="training loss", xscale="log")
    axes.set_ylim(top=min(max(losses), 2.5 * losses[0]))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file, 120)


def compared_curves(file: Path, techniques: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> None:
    """Validation loss and accuracy of techniques per epoch: a thin line per seed and a thick line for the mean.

    `techniques`: for each name, the epochs of each of its runs. The mean ends with the shortest run.
    """
    figure, (left, right) = _figure(1, 2, 12, 4.5)
    for axes, metric in ((left, "val_loss"), (right, "val_top1")):
        for number, (name, runs) in enumerate(techniques.items()):
            colour = colormaps["tab20" if len(techniques) > 10 else "tab10"](number % 20)
            for epochs in runs if len(runs) > 1 else ():
                axes.plot(
                    [row["epoch"] for row in epochs], [row[metric] for row in epochs], color=colour, alpha=0.3, lw=1
                )
            length = min(map(len, runs))
            mean = np.mean([[row[metric] for row in epochs[:length]] for epochs in runs], axis=0)
            x = [row["epoch"] for row in runs[0][:length]]
            axes.plot(x, mean, "os^Dv"[number % 5] + "-", color=colour, markersize=5, label=shortened(name, 40))
        axes.set(xlabel="epoch", ylabel={"val_loss": "validation loss", "val_top1": "validation top-1"}[metric])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    legend = right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, file, 120)


def confusion_matrix(file: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Rows are true classes, columns are predictions. Colours show the share of the row, numbers count images.

    Every class has a row and a column. Above 150 classes, the axes have class numbers in place of names.
    """
    n = len(classes)
    side = min(4 + 0.35 * n, 24)
    figure, (axes,) = _figure(1, 1, side + 1, side)
    figure.set_layout_engine("compressed")  # "constrained" cuts off a label if the aspect of the axes is fixed
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The default blends neighbours if a cell is about one pixel, which hides a single mistake among 1,000 classes.
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    size = float(np.clip(side / 2 + 4, 10, 16))
    if n <= NAMED:
        names = [shortened(name, 24) for name in classes]
        letters = float(np.clip(900 / n, 6, 10))
        axes.set_xticks(range(n), names, rotation=90 if n > 4 else 0, parse_math=False, fontsize=letters)
        axes.set_yticks(range(n), names, parse_math=False, fontsize=letters)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(20, integer=True))
        axes.set_title(f"{n:,} classes, numbered from 0 in the order of per_class.csv", fontsize=size)
    if n <= 30:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted class", fontsize=size)
    axes.set_ylabel("true class", fontsize=size)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the images of the true class", fontsize=size)
    _save(figure, file, 100)


def image_grid(
    file: Path, images: Sequence[np.ndarray], titles: Sequence[str], right: Sequence[bool] | None = None
) -> None:
    """Images, uint8 (H, W, 3), four in a row, with titles: green if `right`, red if not, black without `right`."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    # A single axes for all images, because the layout of sixteen takes a second.
    figure = Figure(figsize=(2.6 * columns, 3.1 * rows))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 2.6 * columns), ylim=(3.1 * rows, 0), aspect="equal")
    axes.set_axis_off()
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = 2.6 * (number % columns) + 0.1, 3.1 * (number // columns) + 0.5
        height, width = (2.4 * side / max(image.shape[:2]) for side in image.shape[:2])
        axes.imshow(image, extent=(left, left + width, top + height, top))
        colour = "black" if right is None else GREEN if right[number] else RED
        text = axes.text(left + 1.2, top - 0.05, title, ha="center", va="bottom", fontsize=9, color=colour)
        text.set_parse_math(False)  # a class may be called $5
    axes.set(xlim=(0, 2.6 * columns), ylim=(3.1 * rows, 0))
    _save(figure, file, 100)


def reliability_diagram(file: Path, measured: Reliability) -> None:
    """Accuracy over confidence in 15 bins, with the gap to the diagonal, above the number of images of each bin."""
    figure, (above, below) = _figure(2, 1, 5.5, 7.5, heights=(3, 1))
    edges = np.arange(BINS + 1) / BINS
    middle, width = (edges[1:] + edges[:-1]) / 2, 1 / BINS
    used = measured.images > 0
    accuracy, confidence = measured.accuracy[used], measured.confidence[used]
    above.bar(middle[used], accuracy, 0.94 * width, color="#5b8fd9", label="accuracy")
    low, high = np.minimum(accuracy, confidence), np.maximum(accuracy, confidence)
    for kind, bins, colour, hatch in (
        ("overconfident: accuracy below confidence", accuracy < confidence, RED, "///"),
        ("underconfident: accuracy above confidence", accuracy > confidence, GREEN, "\\\\\\"),
    ):
        if bins.any():  # the legend has only what is drawn
            style: dict[str, Any] = {"facecolor": "none", "edgecolor": colour, "hatch": hatch, "label": kind}
            above.bar(middle[used][bins], (high - low)[bins], 0.94 * width, bottom=low[bins], **style)
    above.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="accuracy = confidence")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"expected calibration error {measured.error:.4f}")
    below.bar(middle, measured.images, 0.94 * width, color="grey")
    below.set(xlim=(0, 1), xlabel="confidence of the best class", ylabel="images")
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center")  # it would hide bars in the plot
    _save(figure, file, 100)


def embedding_map(file: Path, features: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> None:
    """Features, float32 (n, F), projected to their two principal axes and coloured by class (targets, int64 (n,))."""
    places, shares = principal_axes(features)
    figure, (axes,) = _figure(1, 1, 8, 6.5)
    present = np.unique(targets)
    few = {True: "tab10", False: "tab20"}[len(present) <= 10]
    colours = colormaps[few] if len(present) <= 20 else colormaps["turbo"].resampled(len(present))
    for number, target in enumerate(present):
        rows = targets == target
        name = " " + shortened(classes[target], 24)  # matplotlib leaves out labels that begin with "_"
        axes.scatter(places[rows, 0], places[rows, 1], s=14, color=colours(number), label=name, alpha=0.8, linewidths=0)
    x, y = (f"principal axis {n}: {100 * share:.0f} % of the variance" for n, share in enumerate(shares, 1))
    axes.set(xlabel=x, ylabel=y)
    if len(present) > 30:
        axes.set_title(f"{len(present)} classes, too many for a key; report.html names the class of each point")
    else:
        legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    _save(figure, file, 100)


def principal_axes(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project features, float (n, F), to their two principal axes.

    Returns coordinates, float32 (n, 2), and the share of the variance of each axis, (2,). The signs are those of
    scikit-learn, so equal features give equal coordinates. With a single image, everything is 0.
    """
    if len(features) < 2:
        return np.zeros((len(features), 2), np.float32), np.zeros(2)
    from sklearn.decomposition import PCA  # it takes seconds to import

    model = PCA(2, svd_solver="full" if min(features.shape) < 500 else "randomized", random_state=0)
    places = model.fit_transform(features.astype(np.float64))
    shares = model.explained_variance_ / max(float(features.var(axis=0, ddof=1).sum()), 1e-30)
    return places.astype(np.float32), shares
