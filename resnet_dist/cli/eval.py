"""`resnet-dist eval`: exact metrics of a run, a checkpoint or an exported model, with one line per image."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resnet_dist.config.fields import option, out_of_range
from resnet_dist.config.schema import SystemConfig
from resnet_dist.errors import UsageError
from resnet_dist.runtime.wording import listed, shortened

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from export.predict import Preprocessing
    from resnet_dist.data.index import ImageTable
    from resnet_dist.data.loader import EvalLoader
    from resnet_dist.data.transforms import Batch
    from resnet_dist.evaluation.calibrate import Calibration
    from resnet_dist.evaluation.records import Records

MAX_LOGITS = 1 << 28  # 1 GiB of float32


@dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluate a run, a checkpoint or an exported model in float32: loss, accuracy, macro-F1 and calibration error with
    95 % intervals, every class, every confusion, every image."""

    run: str | None = option(None, positional=True)
    """A run folder, a checkpoint (.safetensors) that resnet-dist wrote, or a model (.onnx) that it exported."""
    data: str | None = option(None, positional=True)
    """A folder or a CSV manifest of images (default: the run's own data, with the split that it used)."""
    split: Literal["train", "val", "test"] = "val"
    """Which part of the data."""
    batch_size: int = option(32, "-b")
    """Images in a batch, per process."""
    workers: int | None = option(None, "-j", "--num-workers")
    """Loader processes per process (default: from cores and processes)."""
    threads: int | None = None
    """CPU threads per process (default: cores divided by the processes of this machine)."""
    output_dir: str | None = option(None, "-o", "--output")
    """Where to write (default: eval/<split>, or eval/<data>-<split> for other data, in the run folder)."""

    calibrate: bool = False
    """Fit a temperature on the validation images and write it to calibration.json beside the checkpoint, for later
    evaluations, export and predict; the order of the classes never changes."""
    precision: float | None = None
    """With --calibrate: also choose a confidence threshold per class above which predictions have at least this
    precision (between 0 and 1), shown with 95 % confidence; predict abstains below it, and always from a class with too
    few images to show it."""
    tta: Literal["none", "flip", "crops"] = "none"
    """Average the probabilities over an image and its mirror image, or over five crops and their mirror images."""
    embeddings: bool = False
    """Also write what the head takes of every image to embeddings.npy, and a map of it."""

    @property
    def is_file(self) -> bool:
        """Whether RUN is a single file, which knows of no images and has no folder to write to."""
        return Path(self.run or "").suffix in (".safetensors", ".onnx")

    @property
    def is_exported(self) -> bool:
        """Whether RUN is an exported model."""
        return Path(self.run or "").suffix == ".onnx"

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder, a checkpoint or an exported model"
        if self.is_file and self.data is None:
            yield "DATA is missing: a checkpoint or an exported model alone does not know where images are"
        if self.is_file and self.output_dir is None:
            yield "--output-dir is missing: a checkpoint or an exported model alone has no run folder to write to"
        if self.is_exported and (self.calibrate or self.embeddings):
            yield "--calibrate and --embeddings need the run or its checkpoint, not the exported model"
        if self.tta != "none" and (self.calibrate or self.embeddings):
            yield "--tta does not go with --calibrate or --embeddings: predict makes one view of an image"
        if self.calibrate and self.split != "val":
            yield f"--calibrate belongs to --split val, not {self.split}"
        if self.precision is not None and not self.calibrate:
            yield "--precision belongs to --calibrate"
        if self.precision is not None and not 0 < self.precision < 1:
            yield f"--precision {self.precision:g}: must be between 0 and 1 (no images show that all are right)"
        yield from out_of_range(self, 1, math.inf, "batch_size", "threads")
        yield from out_of_range(self, 0, 1024, "workers")


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a network or an exported model, and how its images are made and its logits read."""

    model: "nn.Module"
    classes: tuple[str, ...]
    spec: "Preprocessing"
    to_input: Callable[["Batch"], "torch.Tensor"]
    temperature: float
    thresholds: Sequence[float | None]
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What the calibration says of itself."""


def main(cfg: Config) -> int:
    """Evaluate, print and write. Returns the exit code."""
    from resnet_dist.evaluation.collect import collect_records
    from resnet_dist.evaluation.records import Keep
    from resnet_dist.evaluation.tta import Views
    from resnet_dist.runtime.accelerate import on_main, start
    from resnet_dist.runtime.display import Display

    accelerator, _ = start(SystemConfig(mixed_precision="no", threads=cfg.threads))
    run = Path(cfg.run or "")
    file = run if run.is_file() or cfg.is_file else run / "checkpoints" / "best.safetensors"
    on_main(accelerator, lambda: check_outputs(cfg, run, file))
    subject = load_exported(file) if cfg.is_exported else load_network(accelerator, file, cfg.calibrate)
    table = on_main(accelerator, lambda: find_table(cfg, run, subject.classes))
    display = Display(accelerator.is_main_process)
    for note in table.notes:
        display.say(note)
    loader = make_loader(accelerator, cfg, table, subject.spec)
    model, temperature = subject.model.to(accelerator.device), subject.temperature
    if cfg.tta != "none":  # it tempers every view; the mean is not tempered again
        model, temperature = Views(model, cfg.tta, subject.spec.img_size, temperature), 1.0
    records = collect_records(
        accelerator,
        model,
        loader,
        subject.to_input,
        len(subject.classes),
        full_precision=True,
        temperature=temperature,
        keep=Keep(logits=cfg.calibrate, features=cfg.embeddings),
    )
    rows = on_main(accelerator, lambda: write(cfg, file, subject, table, records))
    title = f"{file}: {len(table)} {cfg.split} images, float32; in brackets 95 % intervals"
    display.table(title, rows)
    return 0


def load_network(accelerator: "Accelerator", checkpoint: Path, anew: bool) -> Subject:
    """The network of a checkpoint and its calibration, unless that is to be made `anew`. Raises ArtifactError."""
    from resnet_dist.data.transforms import ToInput
    from resnet_dist.evaluation.calibrate import read_calibration
    from resnet_dist.model.checkpoint import load_checkpoint
    from resnet_dist.model.resnet import build
    from resnet_dist.runtime.accelerate import model_from_main, on_main

    model, description = model_from_main(
        accelerator, lambda: load_checkpoint(checkpoint), lambda described: build(described.architecture)
    )
    classes, spec = description.classes, description.preprocessing
    known = on_main(accelerator, lambda: None if anew else read_calibration(checkpoint, len(classes)))
    temperature, thresholds = (known.temperature, known.thresholds) if known else (1.0, ())
    measured = known.measured if known else {}
    return Subject(model, classes, spec, ToInput(spec, accelerator.device), temperature, thresholds, measured)


def load_exported(file: Path) -> Subject:
    """An exported model, with the calibration that is in it. Raises ArtifactError."""
    import torch

    from resnet_dist.evaluation.exported import Exported, as_pixels

    model = Exported(str(file), torch.get_num_threads())
    known = model.predictor
    thresholds = known.metadata.get("thresholds", ())
    return Subject(model, known.classes, known.preprocessing, as_pixels, known.metadata["temperature"], thresholds)


def make_loader(accelerator: "Accelerator", cfg: Config, table: "ImageTable", spec: "Preprocessing") -> "EvalLoader":
    """The images of this process. Raises UsageError where nothing is left to take other crops from."""
    from resnet_dist.data.loader import EvalImages, EvalLoader, default_workers
    from resnet_dist.runtime import environment as launcher

    if cfg.tta == "crops":
        if spec.resize == spec.img_size:
            raise UsageError("--tta crops: the model's preprocessing crops nothing off; take --tta flip")
        spec = dataclasses.replace(spec, img_size=spec.resize)
    workers = default_workers(accelerator.device, launcher.local_world_size()) if cfg.workers is None else cfg.workers
    return EvalLoader(
        EvalImages(table, spec),
        cfg.batch_size,
        workers,
        pin_memory=accelerator.device.type == "cuda",
        world=accelerator.num_processes,
        rank=accelerator.process_index,
    )


def find_table(cfg: Config, run: Path, classes: tuple[str, ...]) -> "ImageTable":
    """The images to evaluate. Raises DataError, UsageError."""
    from resnet_dist.data.index import read_part, read_run_part

    if cfg.data is None:
        table = read_run_part(run, cfg.split, classes)
    else:
        table = read_part(Path(cfg.data), cfg.split, classes)
    if cfg.calibrate and len(table) * len(classes) > MAX_LOGITS:
        raise UsageError(
            f"--calibrate keeps the logits of all images: {len(table)} x {len(classes)} are too many; give a part of "
            "the images as DATA"
        )
    return table


def check_outputs(cfg: Config, run: Path, file: Path) -> None:
    """See that what will be written replaces nothing but an earlier evaluation and calibration.

    Raises UsageError, MachineError.
    """
    from resnet_dist.evaluation.calibrate import FILE_NAME, is_calibration
    from resnet_dist.files.outputs import check_file, check_folder
    from resnet_dist.report.evaluation import EVALUATION

    check_folder(output_folder(cfg, run), EVALUATION)
    if cfg.calibrate and file.is_file():
        check_file(file.with_name(FILE_NAME), is_calibration, "--calibrate")


def output_folder(cfg: Config, run: Path) -> Path:
    """Where the evaluation is written. Raises UsageError where a link leads out of the run folder."""
    from resnet_dist.files.outputs import inside

    if cfg.output_dir is not None:
        return Path(cfg.output_dir)
    name = cfg.split if cfg.data is None else f"{Path(cfg.data).stem}-{cfg.split}"
    return inside(run, "eval", name if cfg.tta == "none" else f"{name}-{cfg.tta}")


def write(cfg: Config, file: Path, subject: Subject, table: "ImageTable", records: "Records") -> list[tuple[str, str]]:
    """Calibrate if that was asked for, write the evaluation, and give what the terminal shows. On the main process."""
    from resnet_dist.evaluation.calibrate import calibrate, write_calibration
    from resnet_dist.model.weights import sha256_of
    from resnet_dist.report.evaluation import plot_evaluation, write_evaluation
    from resnet_dist.report.on_disk import read_evaluation
    from resnet_dist.report.page import write_evaluation_page

    lines: list[tuple[str, str]] = []
    judged, digest = records, images_digest(table)
    if cfg.calibrate:
        done = calibrate(records, subject.classes, cfg.precision, sha256_of(file))
        made = dataclasses.replace(done.calibration, measured={**done.calibration.measured, "images_sha256": digest})
        records, judged = done.records, done.judged
        subject = dataclasses.replace(subject, temperature=made.temperature, thresholds=made.thresholds)
        lines = [*said_of(made), ("calibration", str(write_calibration(file, made)))]
    elif subject.thresholds:
        lines.append(("abstained", said_of_abstaining(records, subject.thresholds)))
    is_fitted = subject.measured.get("images_sha256") == digest
    if is_fitted and not cfg.calibrate:
        lines += said_of_fitted(subject.measured)
    facts = {"model": file.name, "split": cfg.split, "tta": cfg.tta, "temperature": subject.temperature}
    facts |= {"cross_fitted": ["loss", "ece"]} if cfg.calibrate else {}
    facts |= {"calibrated_on_these_images": True} if is_fitted and not cfg.calibrate else {}
    folder = output_folder(cfg, Path(cfg.run or ""))
    metrics = write_evaluation(folder, table, records, subject.classes, facts, judged)
    plot_evaluation(folder, table, records, subject.classes, subject.spec, judged)
    evaluation = read_evaluation(folder, table.root, cfg.split, subject.classes)
    page = write_evaluation_page(evaluation, None if cfg.is_exported else subject.model, subject.spec)
    rows = [(name, str(metric)) for name, metric in metrics.items()]
    if subject.temperature != 1:
        rows.append(("temperature", f"{subject.temperature:.4f}"))
    rows += [("most confused", line) for line in confused_lines(records, subject.classes)]
    return [*rows, *lines, ("written to", str(folder)), ("to look at", str(page))]


def images_digest(table: "ImageTable") -> str:
    """A hash of which files these are and of their classes, in whatever order and spelling."""
    from resnet_dist.data.same_file import Places

    place = Places(table.root)
    rows = sorted((*place(path), target) for path, target in zip(table.paths, table.targets.tolist(), strict=True))
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def said_of(made: "Calibration") -> Iterator[tuple[str, str]]:
    """What calibrating changes, as rows of the table."""
    found = made.measured
    if "note" in found:
        yield "note", found["note"]
    for name in ("loss", "ece"):
        before, after = found[name]
        yield f"{name} by calibrating", f"{before:.4f} before, {after:.4f} after (cross-fitted, as {name} above)"
    if made.thresholds:
        none = [row for row in found["classes"] if row["threshold"] is None]
        yield (
            "thresholds",
            f"{len(made.thresholds) - len(none)} of {len(made.thresholds)} classes: precision at least "
            f"{found['precision']:g}, with {100 * found['confidence']:g} % confidence in each",
        )
        few = [row["class"] for row in none if row["images"] < found["fewest_images"]]
        if few:
            yield "always abstained", f"{listed(few)}: predicted for fewer than {found['fewest_images']} images"
        weak = [row["class"] for row in none if row["class"] not in few]
        if weak:
            yield "always abstained", f"{listed(weak)}: the precision is not shown at any threshold"
        yield "predictions kept", said_of_kept(found)


def said_of_kept(found: Mapping[str, Any]) -> str:
    """What thresholds do for images that they were not chosen on, from what a calibration says of itself."""
    kept, n = found["cross_fitted"], found["images"]
    if not kept["kept"]:
        return f"0 of {n} (cross-fitted over {found['folds']} folds)"
    low, high = kept["precision_interval"]
    return (
        f"{kept['kept']} of {n}, their precision {kept['precision']:.4f} [{low:.4f}, {high:.4f}] (cross-fitted over "
        f"{found['folds']} folds)"
    )


def said_of_fitted(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The warning that a model is evaluated on the images that it was calibrated on."""
    yield (
        "WARNING",
        "the calibration was fitted on these images, so loss, ece and what is gained by abstaining look too good; "
        f"cross-fitted, loss is {found['loss'][1]:.4f} and ece {found['ece'][1]:.4f}",
    )
    if "cross_fitted" in found:
        yield "predictions kept", said_of_kept(found)


def said_of_abstaining(records: "Records", thresholds: Sequence[float | None]) -> str:
    """How many images the thresholds leave aside, and how good the rest is."""
    from resnet_dist.evaluation.intervals import wilson
    from resnet_dist.evaluation.thresholds import abstained

    kept = ~abstained(records, thresholds)
    n, right = int(kept.sum()), int((records.prediction == records.target)[kept].sum())
    text = f"{len(records) - n} of {len(records)}"
    if n == 0:
        return text
    low, high = wilson(right, n)
    return f"{text}; top1 of the others {right / n:.4f} [{low:.4f}, {high:.4f}]"


def confused_lines(records: "Records", classes: Sequence[str], most: int = 5) -> list[str]:
    """The most confused pairs, a line each."""
    from resnet_dist.evaluation.metrics import confused_pairs, confusion

    pairs = confused_pairs(confusion(records, classes), classes)[:most]
    return [
        f"{shortened(pair['target'], 30)} as {shortened(pair['prediction'], 30)}: {pair['images']} "
        f"({100 * pair['share_of_target']:.0f} %)"
        for pair in pairs
    ]
