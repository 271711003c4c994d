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
    """Print the table. Returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    from resnet_dist.model.resnet import Architecture, empty
    from resnet_dist.model.summary import summarise
    from resnet_dist.model.trainable import select, set_trainable, updating_batch_norms

    architecture = Architecture.of(cfg.model, cfg.num_classes)
    model = empty(architecture)
    phase = cfg.phase[cfg.phase_number - 1]
    set_trainable(model, select(model, phase.trainable))
    layers = summarise(model, cfg.img_size)
    table = Table(title=f"{cfg.model.model}, {cfg.img_size} x {cfg.img_size} pixels", title_justify="left")
    for column in ("layer", "kind", "output", "parameters", "trainable", "MFLOPs"):
        table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
    for layer in layers:
        shape = " x ".join(map(str, layer.shape))
        counts = [f"{n:,}" if n else "" for n in (layer.parameters, layer.trainable)]
        table.add_row(layer.name, layer.kind, shape, *counts, f"{layer.flops / 1e6:,.1f}" if layer.flops else "")
    Console(width=None if Console().is_terminal else 110).print(table)
    total, learning = (sum(getattr(layer, name) for layer in layers) for name in ("parameters", "trainable"))
    flops = sum(layer.flops for layer in layers)
    updating = len(updating_batch_norms(model, phase))
    print(f"parameters {total:,}, trainable {learning:,} ('{phase.trainable}'), {4 * total / 2**20:.1f} MiB in float32")
    print(
        f"forward {flops / 1e9:.3f} GFLOPs per image (2 per multiply-add); "
        f"BatchNorm statistics update in {counted(updating, 'layer')}"
    )
    return 0
