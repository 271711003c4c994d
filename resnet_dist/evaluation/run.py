"""Evaluate a run, a checkpoint or an exported model: exact metrics and a record of every image."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resnet_dist.config.fields import option, out_of_range, required
from resnet_dist.config.foreign import ForeignConfig
from resnet_dist.config.layers import from_keywords, keyword_signature
from resnet_dist.config.schema import SystemConfig
from resnet_dist.errors import UsageError, python_errors
from resnet_dist.files.weights_file import located, names_weights
from resnet_dist.runtime.wording import counted

if TYPE_CHECKING:
    from accelerate import Accelerator

    from export.predict import Preprocessing
    from resnet_dist.data.index import ImageTable
    from resnet_dist.data.loader import EvalLoader
    from resnet_dist.evaluation.calibrate import Calibration
    from resnet_dist.evaluation.metrics import Measured
    from resnet_dist.evaluation.records import Records
    from resnet_dist.evaluation.reliability import Reliability
    from resnet_dist.evaluation.result import Evaluation
    from resnet_dist.evaluation.subject import Subject

MAX_LOGITS = 1 << 28  # 1 GiB of float32


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a run, a checkpoint or an exported model in float32. Report loss, accuracy, macro-F1 and calibration
    error with 95 % intervals, the metrics of every class, the confusion matrix and the prediction for every image."""

    run: str | None = option(None, positional=True)
    """A run folder, a checkpoint (.safetensors) or an exported model (.onnx) of resnet-dist; or the weights of another
    trainer: a file, a folder in the layout of the Hugging Face Hub, or hf://REPOSITORY."""
    data: str | None = option(None, positional=True)
    """A folder or a CSV manifest of images (default: the data of the run, with its split)."""
    split: Literal["train", "val", "test"] = "val"
    """The part of the data to evaluate."""
    batch_size: int = option(32, "-b")
    """Images per batch and process."""
    workers: int | None = option(None, "-j", "--num-workers")
    """Data loading processes per process (default: from the number of cores)."""
    threads: int | None = None
    """CPU threads per process (default: cores divided by the processes of this machine)."""
    output_dir: str | None = option(None, "-o", "--output")
    """The folder to write (default: eval/<split>, or eval/<data>-<split> for other data, in the run folder)."""
    save: bool = True
    """Write tables, plots and report.html. --no-save only prints the metrics (--calibrate still writes)."""

    calibrate: bool = False
    """Fit a temperature on the validation images and write it to calibration.json next to the checkpoint. Later
    evaluations, export and predict use it; the order of the classes never changes."""
    precision: float | None = None
    """With --calibrate: also choose a confidence threshold per class that reaches this precision, between 0 and 1, with
    95 % confidence. predict abstains below it; it never predicts a class that has too few images to prove it."""
    tta: Literal["none", "flip", "crops"] = "none"
    """Test-time augmentation: average the probabilities over an image and its mirror image, or over five crops and
    their mirror images."""
    embeddings: bool = False
    """Also save each image's features (the input of the head) to embeddings.npy, and a map of them."""
    foreign: ForeignConfig = ForeignConfig()

    @property
    def path(self) -> Path:
        """The run folder or the file."""
        return Path(required(self.run, "RUN"))

    @property
    def is_file(self) -> bool:
        """Whether RUN is a model and no run folder, so that DATA and an output folder must be given."""
        return self.run is not None and (self.is_exported or names_weights(self.run))

    @property
    def is_exported(self) -> bool:
        """Whether RUN is an exported model."""
        return self.run is not None and self.path.suffix == ".onnx"

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder, a checkpoint or an exported model"
        if self.is_file and self.data is None:
            yield "DATA is missing: it is needed if RUN is a checkpoint or an exported model"
        if self.is_file and self.output_dir is None and self.save:
            yield "--output-dir is missing: it is needed if RUN is a checkpoint or an exported model"
        if self.is_exported:
            for name in self.foreign.given():
                yield f"{name} needs weights that resnet-dist did not write, not an exported model"
        if self.is_exported and (self.calibrate or self.embeddings):
            yield "--calibrate and --embeddings need a run or a checkpoint, not an exported model"
        if self.tta != "none" and (self.calibrate or self.embeddings):
            yield "--tta cannot be combined with --calibrate or --embeddings, because predict uses one view per image"
        if self.calibrate and self.split != "val":
            yield f"--calibrate needs --split val, not {self.split}"
        if self.precision is not None and not self.calibrate:
            yield "--precision needs --calibrate"
        if self.precision is not None and not 0 < self.precision < 1:
            yield f"--precision {self.precision:g}: must be above 0 and below 1"
        yield from out_of_range(self, 1, math.inf, "batch_size", "threads")
        yield from out_of_range(self, 0, 1024, "workers")


def evaluate(
    run: str | os.PathLike[str], data: str | os.PathLike[str] | None = None, *, verbose: bool = False, **settings: Any
) -> "Evaluation":
    """Evaluate a run, a checkpoint or an exported model in float32.

    `run` is a Run, a run folder, a checkpoint (.safetensors), an exported model (.onnx) or the weights of another
    trainer; `data` a folder or CSV
    manifest of images (default: the data of the run). The other keywords are the options of `resnet-dist eval`. The
    evaluation of a run is written into the run folder, that of a file only if `output_dir` is given, and nothing is
    written with `save=False`. If there are several processes, all must call this, and each gets the evaluation.
    Raises UsageError, DataError, MachineError or ArtifactError.
    """
    keywords = {"run": run, "data": data, **settings}
    if Path(run).suffix == ".onnx" or names_weights(os.fspath(run)):
        keywords.setdefault("save", settings.get("output_dir") is not None)
    with python_errors():
        return run_evaluation(from_keywords(EvalConfig, keywords), verbose)


evaluate.__signature__ = keyword_signature(EvalConfig, verbose=False)  # type: ignore[attr-defined]


def run_evaluation(cfg: EvalConfig, verbose: bool = True) -> "Evaluation":
    """Evaluate, and save the evaluation if `cfg.save` is set. Every process must call this.

    With `verbose`, notes about the data are printed. Raises ResnetDistError.
    """
    from resnet_dist.runtime.isolation import process_settings_restored

    with process_settings_restored():
        return _evaluate(cfg, verbose)


def _evaluate(cfg: EvalConfig, verbose: bool) -> "Evaluation":
    from resnet_dist.runtime import environment as launcher
    from resnet_dist.runtime.display import Display

    display = Display(launcher.rank() == 0, verbose)
    with display.busy("importing torch"):
        from resnet_dist.evaluation.subject import load_exported, load_network
        from resnet_dist.runtime.accelerate import on_main, start

    accelerator, _ = start(SystemConfig(mixed_precision="no", threads=cfg.threads))
    path = cfg.path
    source = cfg.run if path.is_file() or cfg.is_file else str(path / "checkpoints" / "best.safetensors")
    file = on_main(accelerator, lambda: located(required(source, "RUN")))
    folder = on_main(accelerator, lambda: check_outputs(cfg, file))
    with display.busy("reading the model and the list of images"):
        if cfg.is_exported:
            subject = load_exported(file)
        else:
            subject = load_network(accelerator, file, cfg.foreign, calibrated=not cfg.calibrate)
        table = on_main(accelerator, lambda: find_table(cfg, subject.classes))
    for note in (*subject.notes, *table.notes):
        display.say(note)
    with display.busy(f"evaluating {counted(len(table), 'image')}"):
        records = records_of(accelerator, cfg, subject, table)
        evaluation = measure(accelerator, cfg, subject, table, records, folder)
    if folder is not None:
        with display.busy("writing tables, plots and report.html"):
            on_main(accelerator, lambda: save(folder, evaluation, subject, with_evidence=not cfg.is_exported))
    return evaluation


def save(folder: Path, evaluation: "Evaluation", subject: "Subject", with_evidence: bool) -> None:
    """Write the tables, plots and page of an evaluation. Raises MachineError, DataError, ArtifactError."""
    from resnet_dist.evaluation.evidence import evidence_of
    from resnet_dist.report.evaluation import write_evaluation_report

    write_evaluation_report(folder, evaluation, evidence_of(subject.model, evaluation) if with_evidence else {})


# Inputs and outputs


def check_outputs(cfg: EvalConfig, file: Path) -> Path | None:
    """The folder to write, or None. Only an earlier evaluation or calibration may be replaced.

    Raises UsageError, MachineError.
    """
    from resnet_dist.evaluation.calibrate import FILE_NAME, is_calibration
    from resnet_dist.files.outputs import check_file, check_folder
    from resnet_dist.report.evaluation import EVALUATION

    folder = output_folder(cfg) if cfg.save else None
    if folder is not None:
        check_folder(folder, EVALUATION)
    if cfg.calibrate and file.is_file():
        check_file(file.with_name(FILE_NAME), is_calibration, "--calibrate")
    return folder


def output_folder(cfg: EvalConfig) -> Path:
    """The folder for the evaluation. Raises UsageError if a link leads out of the run folder."""
    from resnet_dist.files.outputs import inside

    if cfg.output_dir is not None:
        return Path(cfg.output_dir)
    name = cfg.split if cfg.data is None else f"{Path(cfg.data).stem}-{cfg.split}"
    return inside(cfg.path, "eval", name if cfg.tta == "none" else f"{name}-{cfg.tta}")


def find_table(cfg: EvalConfig, classes: tuple[str, ...]) -> "ImageTable":
    """The images to evaluate. Raises DataError, UsageError."""
    from resnet_dist.data.index import read_part, read_run_part

    if cfg.data is None:
        table = read_run_part(cfg.path, cfg.split, classes)
    else:
        table = read_part(Path(cfg.data), cfg.split, classes)
    if cfg.calibrate and len(table) * len(classes) > MAX_LOGITS:
        raise UsageError(
            f"--calibrate keeps the logits of all images: {len(table)} x {len(classes)} are too many; give fewer "
            "images as DATA"
        )
    return table


# The computation


def records_of(accelerator: "Accelerator", cfg: EvalConfig, subject: "Subject", table: "ImageTable") -> "Records":
    """Compute the records of all images. Every process must call this and gets all records."""
    from resnet_dist.evaluation.collect import collect_records
    from resnet_dist.evaluation.records import Keep
    from resnet_dist.evaluation.tta import Views

    model, temperature = subject.model.to(accelerator.device), subject.temperature
    if cfg.tta != "none":  # the temperature is applied to each view, not to their mean
        model, temperature = Views(model, cfg.tta, subject.spec.img_size, temperature), 1.0
    return collect_records(
        accelerator,
        model,
        make_loader(accelerator, cfg, table, subject.spec),
        subject.to_input,
        len(subject.classes),
        full_precision=True,
        temperature=temperature,
        keep=Keep(logits=cfg.calibrate, features=cfg.embeddings),
    )


def make_loader(
    accelerator: "Accelerator", cfg: EvalConfig, table: "ImageTable", spec: "Preprocessing"
) -> "EvalLoader":
    """The batches of this process. Raises UsageError for --tta crops if the preprocessing does not crop."""
    from resnet_dist.data.loader import EvalImages, EvalLoader, default_workers
    from resnet_dist.runtime import environment as launcher

    if cfg.tta == "crops":
        if spec.resize == spec.img_size:
            raise UsageError("--tta crops: the preprocessing of the model does not crop; use --tta flip")
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


@dataclass(frozen=True)
class Judged:
    """What the main process computes from the records and sends to the other processes."""

    metrics: "Mapping[str, Measured]"
    reliability: "Reliability"
    calibration: "Calibration | None"
    calibration_file: Path | None = None
    fitted_on_these: bool = False


def measure(
    accelerator: "Accelerator",
    cfg: EvalConfig,
    subject: "Subject",
    table: "ImageTable",
    records: "Records",
    folder: Path | None,
) -> "Evaluation":
    """Calibrate if `cfg.calibrate` is set, and make the evaluation. Every process must call this."""
    from resnet_dist.evaluation.calibrate import tempered
    from resnet_dist.evaluation.result import Evaluation
    from resnet_dist.runtime.accelerate import on_main

    judged = on_main(accelerator, lambda: judge(cfg, subject, table, records))
    calibration = judged.calibration
    if cfg.calibrate and calibration is not None:
        records = dataclasses.replace(tempered(records, calibration.temperature), logits=None)
    facts: dict[str, Any] = {"model": subject.file.name, "split": cfg.split, "tta": cfg.tta}
    facts["temperature"] = calibration.temperature if calibration else 1.0
    if cfg.calibrate:
        facts["cross_fitted"] = ["loss", "ece"]
    elif judged.fitted_on_these:
        facts["calibrated_on_these_images"] = True
    return Evaluation(
        model=subject.file,
        table=table,
        split=cfg.split,
        classes=subject.classes,
        spec=subject.spec,
        records=records,
        metrics=judged.metrics,
        reliability=judged.reliability,
        facts=facts,
        calibration=calibration,
        calibration_file=judged.calibration_file,
        folder=folder,
    )


def judge(cfg: EvalConfig, subject: "Subject", table: "ImageTable", records: "Records") -> Judged:
    """Compute the metrics. If `cfg.calibrate` is set, also fit the calibration and write it next to the checkpoint.

    Raises DataError, MachineError.
    """
    from resnet_dist.evaluation.calibrate import calibrate, write_calibration
    from resnet_dist.evaluation.metrics import measured
    from resnet_dist.evaluation.reliability import reliability
    from resnet_dist.model.weights import sha256_of

    digest, calibration = images_digest(table), subject.calibration
    if not cfg.calibrate:
        on_these = calibration is not None and calibration.measured.get("images_sha256") == digest
        return Judged(measured(records), reliability(records), calibration, fitted_on_these=on_these)
    result = calibrate(records, subject.classes, cfg.precision, sha256_of(subject.file))
    measurements = {**result.calibration.measured, "images_sha256": digest}
    calibration = dataclasses.replace(result.calibration, measured=measurements)
    file = write_calibration(subject.file, calibration)
    return Judged(measured(result.judged), reliability(result.judged), calibration, file)


def images_digest(table: "ImageTable") -> str:
    """A hash of the identity and class of all files, independent of their order and of how paths are written."""
    from resnet_dist.data.same_file import Places

    place = Places(table.root)
    rows = sorted((*place(path), target) for path, target in zip(table.paths, table.targets.tolist(), strict=True))
    return hashlib.sha256(repr(rows).encode()).hexdigest()
