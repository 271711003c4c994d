"""Pictures of a run, as PNG. Every function draws plain data that it is given."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_dist.wording import shortened

GREEN, RED = "#1a7f37", "#cf222e"


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def curves(file: Path, epochs: Sequence[Mapping[str, float]]) -> None:
    """Loss and accuracy of every epoch, training and validation; a dashed line where a phase begins."""
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
    figure.savefig(file, dpi=120, bbox_inches="tight")


def learning_rates(file: Path, steps: Sequence[Mapping[str, Any]]) -> None:
    """The learning rate of every parameter group over the optimizer steps, on a logarithmic axis."""
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
    figure.savefig(file, dpi=120, bbox_inches="tight")


def confusion_matrix(file: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Rows are true classes, columns predictions, colour the share of the row; numbers are images."""
    n = len(classes)
    side = min(4 + 0.35 * n, 24)
    figure, (axes,) = _figure(1, 1, side + 1, side)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= 60:
        names = [shortened(name, 24) for name in classes]
        axes.set_xticks(range(n), names, rotation=90 if n > 4 else 0, parse_math=False)
        axes.set_yticks(range(n), names, parse_math=False)
    if n <= 30:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    figure.savefig(file, dpi=100, bbox_inches="tight")


def image_grid(
    file: Path, images: Sequence[np.ndarray], titles: Sequence[str], right: Sequence[bool] | None = None
) -> None:
    """Images, uint8 (H, W, 3), four in a row, each under its title; green where `right`, red where not."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure, axes = _figure(rows, columns, 2.6 * columns, 2.9 * rows)
    for place in axes:
        place.axis("off")
    for number, (place, image, title) in enumerate(zip(axes, images, titles, strict=False)):
        place.imshow(image)
        colour = "black" if right is None else GREEN if right[number] else RED
        place.set_title(title, fontsize=9, color=colour, parse_math=False)  # a class may be called $5
    figure.savefig(file, dpi=100, bbox_inches="tight")
