"""Explain predictions with saliency maps, for image files or for the worst mistakes of a run."""

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resnet_dist.config.fields import option, out_of_range, required
from resnet_dist.config.schema import SystemConfig
from resnet_dist.errors import ArtifactError, DataError, UsageError
from resnet_dist.runtime.wording import listed, suggestion

if TYPE_CHECKING:
    import torch
    from torch import nn

    from resnet_dist.model.checkpoint import Description
    from resnet_dist.report.explanations import Explanation

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Write saliency maps, which show the regions of an image that led to a class, and a sheet of the first maps."""

    run: str | None = option(None, positional=True)
    """A run folder, or a checkpoint (.safetensors) that resnet-dist wrote."""
    images: tuple[str, ...] = option((), positional=True)
    """Image files, folders or patterns (default: the worst mistakes of the run's last evaluation)."""
    method: Literal["gradcam", "occlusion", "integrated-gradients", "gradientshap"] = "gradcam"
    """The saliency method; all but gradcam need captum (pip install 'resnet-dist[explain]')."""
    target: str | None = option(None, "--class")
    """The class to explain (default: the predicted class)."""
    worst: int = 16
    """Number of mistakes to explain, highest loss first, if no images are given."""
    split: Literal["train", "val", "test"] = "val"
    """The split whose mistakes are explained."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    output_dir: str | None = option(None, "-o", "--output")
    """The folder to write (default: explain/<method> in the run folder)."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        is_file = self.run is not None and Path(self.run).suffix == ".safetensors"
        if self.run is None:
            yield "RUN is missing: a run folder or a checkpoint"
        if is_file and not self.images:
            yield "IMAGES are missing: they are needed if RUN is a checkpoint"
        if is_file and self.output_dir is None:
            yield "--output-dir is missing: it is needed if RUN is a checkpoint"
        yield from out_of_range(self, 1, math.inf, "worst", "threads")


@dataclass(frozen=True)
class Item:
    """An image to explain: its file, and its label or ""."""

    file: str
    target: str = ""


@dataclass(frozen=True)
class Explained:
    """The folder with the explanations, and the number of images."""

    folder: Path
    images: int

    @property
    def sheet(self) -> Path:
        """The picture of the first explanations."""
        return self.folder / "sheet.png"


def run_explain(cfg: ExplainConfig, verbose: bool = True) -> Explained:
    """Explain and write on the main process; every process must call this. With `verbose`, print the ignored files.

    Raises UsageError, DataError, ArtifactError, MachineError.
    """
    from resnet_dist.runtime.accelerate import on_main, start
    from resnet_dist.runtime.isolation import process_settings_restored

    with process_settings_restored():
        accelerator, _ = start(SystemConfig(mixed_precision="no", threads=cfg.threads))
        say: Callable[[str], None] = print if verbose else lambda _: None
        return on_main(accelerator, lambda: explain_all(cfg, accelerator.device, say))


def explain_all(cfg: ExplainConfig, device: "torch.device", say: Callable[[str], None]) -> Explained:
    """Explain and write on this process. Raises ResnetDistError."""
    from resnet_dist.files.outputs import check_folder, inside
    from resnet_dist.model.checkpoint import load_checkpoint
    from resnet_dist.report.explanations import EXPLANATIONS, write_explanations

    run = Path(required(cfg.run, "RUN"))
    checkpoint = run if run.is_file() or run.suffix == ".safetensors" else run / "checkpoints" / "best.safetensors"
    folder = Path(cfg.output_dir) if cfg.output_dir else inside(run, "explain", cfg.method)
    check_folder(folder, EXPLANATIONS)
    model, description = load_checkpoint(checkpoint)
    if cfg.target is not None and cfg.target not in description.classes:
        near = suggestion(cfg.target, description.classes) or f": there are {listed(description.classes)}"
        raise UsageError(f"--target: there is no class '{cfg.target}'{near}")
    items = named_images(cfg, say) if cfg.images else worst_mistakes(cfg, run)
    model.to(device)
    explanations = [
        explanation
        for start in range(0, len(items), BATCH)
        for explanation in explain_batch(cfg, items[start : start + BATCH], model, description, device)
    ]
    write_explanations(folder, explanations)
    return Explained(folder, len(explanations))


def explain_batch(
    cfg: ExplainConfig, items: list[Item], model: "nn.Module", description: "Description", device: "torch.device"
) -> "Iterator[Explanation]":
    """Yield the explanations of a batch of images. Raises DataError if an image cannot be used."""
    import numpy as np
    import torch

    from export.predict import ImageError, decode, fit, normalise
    from resnet_dist.evaluation.saliency import explain
    from resnet_dist.report.explanations import Explanation

    pixels = []
    for item in items:
        try:
            pixels.append(fit(decode(item.file), description.preprocessing))
        except ImageError as error:
            raise DataError(f"{item.file}: {error}") from None
        except OSError as error:
            raise DataError(f"{item.file}: cannot be opened ({error.strerror})") from None
    inputs = torch.from_numpy(normalise(np.stack(pixels), description.preprocessing)).permute(0, 3, 1, 2).to(device)
    with torch.no_grad():
        best = model(inputs).softmax(1).max(1)
    names = [description.classes[index] for index in best.indices.tolist()]
    explained = [cfg.target or name for name in names]
    wanted = torch.tensor([description.classes.index(name) for name in explained], device=device)
    heat = explain(cfg.method, model, inputs, wanted).cpu().numpy()
    for row, item in enumerate(items):
        probability = float(best.values[row])
        yield Explanation(item.file, pixels[row], heat[row], names[row], probability, item.target, explained[row])


def named_images(cfg: ExplainConfig, say: Callable[[str], None]) -> list[Item]:
    """The images given on the command line. Raises UsageError."""
    from export import predict

    try:
        return [Item(file) for file in predict.find_images(cfg.images, say)]
    except predict.UsageError as error:
        raise UsageError(str(error)) from None


def worst_mistakes(cfg: ExplainConfig, run: Path) -> list[Item]:
    """The images with the highest loss among the wrong predictions of the last evaluation.

    Raises UsageError if there is no evaluation or no mistake, ArtifactError if its file is damaged.
    """
    from resnet_dist.files.run import read_facts

    root, file = Path(str(read_facts(run).get("data_root", ""))), run / "eval" / cfg.split / "predictions.csv"
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            rows = [row for row in csv.DictReader(stream) if row["prediction"] != row["target"]]
            rows.sort(key=lambda row: -float(row["loss"]))
            items = [Item(str(root / row["path"]), row["target"]) for row in rows[: cfg.worst]]
    except FileNotFoundError:
        raise UsageError(f"{file}: does not exist; run `resnet-dist eval {run} --split {cfg.split}` first") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ArtifactError(f"{file}: damaged ({error}); run `resnet-dist eval` again") from None
    if not items:
        raise UsageError(f"{file}: it contains no mistakes; give the images to explain")
    return items
