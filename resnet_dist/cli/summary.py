"""`resnet-dist summary`: layers, output shapes, parameters and FLOPs of a model, and what is trainable."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from resnet_dist.config.fields import option, out_of_range
from resnet_dist.config.schema import ModelConfig, Phase
from resnet_dist.runtime.wording import counted


@dataclass(frozen=True, kw_only=True)
class Config:
    """Print layers, output shapes, parameters and FLOPs of a model, and what is trainable in a phase of a recipe."""

    model: ModelConfig = ModelConfig(weights="none")
    num_classes: int = 1000
    """Number of classes."""
    img_size: int = option(224, "--imgsz", "--image-size")
    """Side of the square input in pixels."""
    phase_number: int = 1
    """The phase of the recipe that decides what is trainable: 1, 2, ..."""
    recipe: str | None = None
    phase: tuple[Phase, ...] = (Phase(),)

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from self.model.problems()
        yield from out_of_range(self, 1, math.inf, "num_classes", "img_size")
        if not 1 <= self.phase_number <= len(self.phase):
            yield f"--phase-number {self.phase_number}: the recipe has {counted(len(self.phase), 'phase')}"


def main(cfg: Config) -> int:
    """Print the table and the totals. Returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    from resnet_dist.model.summary import COLUMNS, summary_of

    summary = summary_of(cfg.model, cfg.num_classes, cfg.img_size, cfg.phase[cfg.phase_number - 1])
    table = Table(title=f"{cfg.model.model}, {cfg.img_size} x {cfg.img_size} pixels", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
    for row in summary.rows():
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 110).print(table)
    for line in summary.lines():
        print(line)
    return 0
