"""Rank the labels of training images by how likely they are to be wrong."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.config.fields import option, out_of_range, required
from resnet_dist.config.schema import ModelConfig, SystemConfig
from resnet_dist.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from torch import nn

    from resnet_dist.data.index import ImageTable
    from resnet_dist.evaluation.confident_learning import LabelErrors
    from resnet_dist.model.checkpoint import Description
    from resnet_dist.model.resnet import Architecture

FILE = "label_errors.csv"
COLUMNS = ("path", "label", "likely", "quality", "suspected")


@dataclass(frozen=True, kw_only=True)
class LabelErrorsConfig:
    """Find training images whose label is probably wrong, and write label_errors.csv into the run folder.

    Logistic regressions predict each label by cross-validation from features of the initial weights, so a label is
    never judged by a model that was trained on it. If the regressions are not accurate enough, no label is suspected.
    `report RUN` then shows the images.
    """

    run: str | None = option(None, positional=True)
    """A run folder."""
    folds: int = 5
    """Number of folds for cross-validation."""
    weights: str | None = None
    """Pretrained weights for the features, as for train (default: the initial weights of the run)."""
    batch_size: int = option(32, "-b")
    """Images per batch and process."""
    workers: int | None = option(None, "-j", "--num-workers")
    """Data loading processes per process (default: from the number of cores)."""
    threads: int | None = None
    """CPU threads per process (default: cores divided by the processes of this machine)."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder"
        if self.weights == "none":
            yield "--weights none: random weights give no useful features; give pretrained weights"
        yield from out_of_range(self, 2, 100, "folds")
        yield from out_of_range(self, 1, math.inf, "batch_size", "threads")
        yield from out_of_range(self, 0, 1024, "workers")


@dataclass(frozen=True)
class LabelRanking:
    """The result of `label-errors`.

    Attributes:
        file: label_errors.csv with all images, the most suspicious first.
        sentence: the number of suspected labels, and how well the labels are predicted.
        suspects: (path, label, likely class) of every suspected label, the most suspicious first.
    """

    file: Path
    sentence: str
    suspects: list[tuple[str, str, str]]


def run_label_errors(cfg: LabelErrorsConfig) -> LabelRanking:
    """Rank the labels and write label_errors.csv. Every process must call this.

    Raises UsageError, DataError, ArtifactError, MachineError.
    """
    from resnet_dist.runtime.accelerate import start
    from resnet_dist.runtime.isolation import process_settings_restored

    with process_settings_restored():
        accelerator, _ = start(SystemConfig(mixed_precision="no", threads=cfg.threads))
        return _run(accelerator, cfg)


def _run(accelerator: "Accelerator", cfg: LabelErrorsConfig) -> LabelRanking:
    from resnet_dist.data.index import read_run_part
    from resnet_dist.files.outputs import check_file, table_with
    from resnet_dist.model.checkpoint import load_checkpoint
    from resnet_dist.model.resnet import build
    from resnet_dist.runtime.accelerate import model_from_main, on_main

    run = Path(required(cfg.run, "RUN"))
    on_main(accelerator, lambda: check_file(run / FILE, table_with(*COLUMNS), "RUN") if run.is_dir() else None)
    description = on_main(accelerator, lambda: load_checkpoint(run / "checkpoints" / "best.safetensors")[1])
    classes = description.classes
    table = on_main(accelerator, lambda: read_run_part(run, "train", classes))
    on_main(accelerator, lambda: check_folds(cfg.folds, table, classes))
    model, _ = model_from_main(accelerator, lambda: pretrained(cfg, run, description), build)
    features = features_of(accelerator, cfg, model, description, table)
    return on_main(accelerator, lambda: judge(cfg.folds, run, table, features, classes))


def features_of(
    accelerator: "Accelerator",
    cfg: LabelErrorsConfig,
    model: "nn.Module",
    description: "Description",
    table: "ImageTable",
) -> "np.ndarray":
    """The input of the head for every image, float32 (n, F). Every process must call this."""
    from resnet_dist.data.loader import EvalImages, EvalLoader, default_workers
    from resnet_dist.data.transforms import ToInput
    from resnet_dist.evaluation.collect import collect_records
    from resnet_dist.evaluation.records import Keep
    from resnet_dist.runtime import environment as launcher

    device, spec, classes = accelerator.device, description.preprocessing, description.classes
    workers = default_workers(device, launcher.local_world_size()) if cfg.workers is None else cfg.workers
    world, rank = accelerator.num_processes, accelerator.process_index
    loader = EvalLoader(EvalImages(table, spec), cfg.batch_size, workers, device.type == "cuda", world, rank)
    to_input, keep = ToInput(spec, device), Keep(features=True)
    records = collect_records(accelerator, model, loader, to_input, len(classes), full_precision=True, keep=keep)
    assert records.features is not None
    return records.features


def check_folds(folds: int, table: "ImageTable", classes: tuple[str, ...]) -> None:
    """Raise UsageError if a class has fewer images than there are folds."""
    import numpy as np

    counts = np.bincount(table.targets, minlength=len(classes))
    if counts.min() < folds:
        rarest = int(counts.argmin())
        raise UsageError(
            f"--folds {folds}: class '{classes[rarest]}' has {counts[rarest]} training images and needs one per fold"
        )


def pretrained(cfg: LabelErrorsConfig, run: Path, description: "Description") -> tuple["nn.Module", "Architecture"]:
    """A network with the initial weights of the run (or those of --weights), and its architecture.

    Raises UsageError, ArtifactError, MachineError.
    """
    from resnet_dist.config.stored import read_toml
    from resnet_dist.model import weights
    from resnet_dist.model.resnet import Architecture, build
    from resnet_dist.model.start import StartingPoint

    trained = description.architecture
    stored = read_toml(run / "config.toml")
    start = StartingPoint.of(stored.get("model", {}).get("weights", "none"), stored.get("run", {}).get("init_from"))
    if cfg.weights is None and not start.pretrained:
        raise UsageError(
            f"--weights is missing: {run} started from random weights, so it has no features that were learned without "
            "these labels; give pretrained weights"
        )
    if cfg.weights is None and start.kind == "run":
        raise UsageError(
            f"--weights is missing: {run} started from {start}, which may have been trained on these labels; give "
            f"pretrained weights, or {start.file} if it was trained on other images"
        )
    settings: dict[str, Any] = {"model": trained.name, "weights": cfg.weights or start.source, "stem": trained.stem}
    model_cfg = ModelConfig(**settings)
    architecture = Architecture.of(model_cfg, trained.num_classes)
    model = build(architecture)
    file = weights.weights_file(model_cfg)
    weights.load_backbone(model, weights.read_tensors(file), architecture, str(file))
    return model, architecture


def judge(folds: int, run: Path, table: "ImageTable", features: "np.ndarray", classes: tuple[str, ...]) -> LabelRanking:
    """Judge the labels by features, float32 (n, F), and write label_errors.csv. Raises MachineError."""
    from resnet_dist.evaluation.confident_learning import OUT_OF_FOLD, find, out_of_fold
    from resnet_dist.files.run import to_csv, write_atomically

    errors = find(table.targets, out_of_fold(features, table.targets, folds))
    rows = [label_row(table, errors, classes, int(position)) for position in errors.order]
    write_atomically(run / FILE, to_csv(COLUMNS, rows))
    suspected = int(errors.suspected.sum())
    suspects = [(path, label, likely) for path, label, likely, *_ in rows[:suspected]]
    return LabelRanking(run / FILE, errors.judge.sentence(suspected, OUT_OF_FOLD), suspects)


def label_row(
    table: "ImageTable", errors: "LabelErrors", classes: tuple[str, ...], position: int
) -> tuple[str, str, str, str, int]:
    """The row of one image: path, label, likely, quality, suspected (1 or 0)."""
    label, likely = classes[table.targets[position]], classes[errors.likely[position]]
    return table.paths[position], label, likely, f"{errors.quality[position]:.6f}", int(errors.suspected[position])
