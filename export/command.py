"""`resnet-dist export`: from a checkpoint to a bundle that has proved itself."""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.config.fields import option, out_of_range
from resnet_dist.errors import ArtifactError, DataError, MachineError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import nn

    from resnet_dist.data.index import ImageTable
    from resnet_dist.model.checkpoint import Description

REPORT = "export_report.json"
MIN_CALIBRATION = 64
MIN_AGREEMENT = 90.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Export a run's best checkpoint to ONNX; a file gets its name only after it is proven equal to training."""

    run: str | None = option(None, positional=True)
    """A run folder, or a checkpoint (.safetensors) that resnet-dist wrote."""
    data: str | None = None
    """Images for the gate, a folder or a manifest (default: the validation part of the run's own data)."""
    output_dir: str | None = option(None, "-o", "--output")
    """Where to (default: export in the run folder, or beside the checkpoint)."""
    overwrite: bool = False
    """Replace the export that is there."""
    preprocess_in_graph: bool = option(False, "--with-preprocess")
    """Take uint8 images and normalise in the graph; also puts out probabilities."""
    embeddings: bool = False
    """Also put out what the head takes of an image, for `predict --embed`."""
    fp16: bool = option(False, "--half")
    """Also write model.fp16.onnx."""
    int8: bool = False
    """Also write model.int8.onnx, calibrated on training images. It is kept only if it agrees with float32."""
    reduce_range: bool = True
    """7-bit weights in int8, so that it gives the same on every CPU; without it, only on ARM and x86 with VNNI."""
    calibration_images: int = 128
    """Training images that int8's ranges are taken from."""
    images: int = 64
    """Validation images for the gate on the float32 file."""
    full: bool = False
    """All of them."""
    min_agreement: float = MIN_AGREEMENT
    """Percent of the validation images whose top-1 int8 must share with float32, at the interval's lower end."""
    max_accuracy_drop: float = 1.0
    """Points of top-1 that int8 may lose, beyond what the number of images can resolve."""
    time: bool = False
    """Print the latency of every file for batches of 1 and 32."""
    threads: int | None = None
    """CPU threads (default: all cores)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder or a checkpoint"
        yield from out_of_range(self, 1, math.inf, "images", "threads")
        yield from out_of_range(self, MIN_CALIBRATION, math.inf, "calibration_images")
        yield from out_of_range(self, 0, 100, "max_accuracy_drop", "min_agreement")
        if not self.reduce_range and not self.int8:
            yield "--no-reduce-range belongs to --int8"


def main(cfg: Config) -> int:
    """Export, prove and put in place. Returns the exit code. Raises ResnetDistError; nothing half-written is left."""
    import torch

    from export.bundle import check_target, put_in_place
    from resnet_dist.files.outputs import inside
    from resnet_dist.model.checkpoint import load_checkpoint
    from resnet_dist.runtime import environment as launcher

    torch.set_num_threads(cfg.threads or launcher.cores())
    run = Path(cfg.run or "")
    checkpoint = run if run.is_file() or run.suffix == ".safetensors" else run / "checkpoints" / "best.safetensors"
    out = Path(cfg.output_dir) if cfg.output_dir else inside(run if run.is_dir() else run.parent, "export")
    check_target(out, cfg.overwrite)
    model, description = load_checkpoint(checkpoint)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".tmp-export-", dir=out.parent))
        made.chmod(out.parent.stat().st_mode & 0o777)
    except OSError as error:
        raise MachineError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        report = fill(made, cfg, checkpoint, model, description)
        can_stay = (out / "model.onnx").exists()  # an export that a refused one does not replace
        written = report["passed"] or not (can_stay or "model.onnx" in report["refused"])
        if written:
            put_in_place(made, out)
        else:
            report_file = keep_report(made, out)
    except OSError as error:
        raise MachineError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if not written:
        stays = "; the export that is there stays as it was" if report_file.name != REPORT else ""
        raise ArtifactError(f"the gate refused the export: {report['problems'][0]}{stays}; {report_file} has all")
    kept = {name: size for name, size in report["files_mib"].items() if name not in report["refused"]}
    print(f"written to {out}: {', '.join(f'{name} ({size} MiB)' for name, size in kept.items())}")
    if report["refused"]:
        passed = ", ".join(kept)
        raise ArtifactError(f"the gate refused {report['problems'][0]}; {passed} passed and is in {out}")
    if cfg.time:
        print_times(out, list(kept), cfg.threads or launcher.cores())
    return 0


def keep_report(made: Path, out: Path) -> Path:
    """Leave only the report of a refused export, and return its path; an export that is there is not touched."""
    out.mkdir(exist_ok=True)
    file = out / ("export_report.failed.json" if (out / "model.onnx").exists() else REPORT)
    shutil.copyfile(made / REPORT, file)
    return file


def fill(made: Path, cfg: Config, checkpoint: Path, model: "nn.Module", description: "Description") -> dict[str, Any]:
    """Write the model files and prove them; those that are refused are removed. Returns the report.

    If model.onnx passes, the side files are written too. Raises ResnetDistError.
    """
    from export.bundle import sizes, write_side_files
    from export.quantize import may_saturate
    from export.to_onnx import describe, graph_of, runtime_logits, self_test_logits
    from export.verify import check_equality, compare_smaller
    from resnet_dist.evaluation.calibrate import read_calibration
    from resnet_dist.files.run import to_json

    in_graph = cfg.preprocess_in_graph
    with tempfile.TemporaryDirectory(prefix="resnet-dist-gate-") as folder:
        table, source = gate_images(cfg, description, Path(folder))
        labelled = source != "synthetic"
        print(f"gate on {source} images, {len(table)} at hand" + ("" if labelled else ": give --data for real ones"))
        calibration = read_calibration(checkpoint, len(description.classes))
        temperature = calibration.temperature if calibration else 1.0
        print(f"temperature {temperature:.4f} (calibration.json)" if calibration else "not calibrated")
        inputs = calibration_inputs(cfg, description) if cfg.int8 else []  # what is wrong with them is said first
        graph = graph_of(model, description.preprocessing, in_graph, temperature, cfg.embeddings)
        expected = self_test_logits(model, description.preprocessing)
        metadata = describe(description, checkpoint, "fp32", in_graph, expected, calibration)
        write_model(made / "model.onnx", graph, metadata)
        some = first(table, len(table) if cfg.full else cfg.images)
        reports: dict[str, Any] = {
            "model.onnx": check_equality(model, some, made / "model.onnx", labelled, temperature)
        }
        print(f"{'model.onnx':<16} {reports['model.onnx']}")
        for name, small in smaller_graphs(cfg, graph, inputs):
            expected = runtime_logits(small, self_test_feed(made))[0]
            smaller = describe(description, checkpoint, name.split(".")[1], in_graph, expected, calibration)
            write_model(made / name, small, smaller)
            limits = (cfg.max_accuracy_drop, cfg.min_agreement)
            reports[name] = compare_smaller(made / "model.onnx", made / name, table, labelled, *limits)
            print(f"{name:<16} {reports[name]}")
            if may_saturate(small):
                print(f"{name:<16} 8-bit weights: on x86 CPUs without VNNI it can give other classes than here")
    problems = [f"{name}: {problem}" for name, part in reports.items() for problem in part.problems]
    refused = [name for name, part in reports.items() if part.problems]
    report: dict[str, Any] = {"passed": not refused, "refused": refused, "problems": problems, "gate_images": source}
    report |= {name: part.to_dict() for name, part in reports.items()} | {"files_mib": sizes(made, list(reports))}
    (made / REPORT).write_text(to_json(report))
    for name in refused:
        (made / name).unlink()
    if "model.onnx" not in refused:
        write_side_files(made, metadata)
    return report


def write_model(file: Path, graph: "onnx.ModelProto", metadata: dict[str, Any]) -> None:
    """The bytes of a model, with its metadata."""
    from export.to_onnx import finished

    file.write_bytes(finished(graph, metadata))


def self_test_feed(made: Path) -> "dict[str, np.ndarray]":
    """The self-test's image as the graphs of this export take it."""
    from export.predict import Predictor, self_test_pixels

    predictor = Predictor(made / "model.onnx", providers="cpu")
    return predictor.inputs(self_test_pixels(predictor.preprocessing.img_size))


def smaller_graphs(
    cfg: Config, graph: "onnx.ModelProto", inputs: "list[np.ndarray]"
) -> "Iterator[tuple[str, onnx.ModelProto]]":
    """The fp16 and int8 graphs that were asked for, under their file names; int8's ranges are taken from `inputs`."""
    from export.quantize import to_fp16, to_int8

    if cfg.fp16:
        yield "model.fp16.onnx", to_fp16(graph)
    if cfg.int8:
        yield "model.int8.onnx", to_int8(graph, inputs, cfg.reduce_range)


def gate_images(cfg: Config, description: "Description", folder: Path) -> "tuple[ImageTable, str]":
    """Validation images: of --data, of the run, or (in `folder`) synthetic ones; and which of these."""
    from resnet_dist.data.index import read_part, read_run_part

    if cfg.data is not None:
        return read_part(Path(cfg.data), "val", description.classes), "given"
    if Path(cfg.run or "").is_dir():
        return read_run_part(Path(cfg.run or ""), "val", description.classes), "validation"
    return synthetic_images(folder), "synthetic"


def calibration_inputs(cfg: Config, description: "Description") -> "list[np.ndarray]":
    """Training images, spread evenly, as inputs of the graph. Raises UsageError where there are none, DataError."""
    import numpy as np

    from export.predict import normalise
    from resnet_dist.data.decode import load_fitted
    from resnet_dist.data.index import read_part, read_run_part

    run = Path(cfg.run or "")
    if cfg.data is not None:
        table = read_part(Path(cfg.data), "train", description.classes)
    elif run.is_dir():
        table = read_run_part(run, "train", description.classes)
    else:
        raise UsageError("--int8 needs training images to calibrate on: give --data")
    if len(table) < MIN_CALIBRATION:
        raise DataError(
            f"--int8 needs at least {MIN_CALIBRATION} training images to calibrate on, there are {len(table)}"
        )
    chosen = np.unique(np.linspace(0, len(table) - 1, min(cfg.calibration_images, len(table))).round().astype(int))
    spec = description.preprocessing
    pixels = [load_fitted(table, int(i), spec) for i in chosen]
    if cfg.preprocess_in_graph:
        return pixels
    return [np.ascontiguousarray(normalise(image, spec).transpose(2, 0, 1)) for image in pixels]


def first(table: "ImageTable", count: int) -> "ImageTable":
    """`count` images spread evenly over the table, or all if there are fewer."""
    import numpy as np

    from resnet_dist.data.index import ImageTable, PathTable

    chosen = np.unique(np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(int))
    return ImageTable(table.root, PathTable([table.paths[int(i)] for i in chosen]), table.targets[chosen])


def synthetic_images(folder: Path, count: int = MIN_CALIBRATION) -> "ImageTable":
    """Noise and gradients of many sizes as PNG files: enough to compare pipelines, not to say how good a model is."""
    import numpy as np
    from PIL import Image

    from resnet_dist.data.index import ImageTable, PathTable

    random = np.random.default_rng(0)
    for number in range(count):
        height, width = (int(n) for n in random.integers(40, 500, 2))
        ramp = np.linspace(0, 255, width)[None, :, None] * random.random(3)
        noise = random.normal(0, 40, (height, width, 3))
        Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")
    names = sorted(file.name for file in folder.iterdir())
    return ImageTable(folder, PathTable(names), np.zeros(count, np.int64))


def print_times(out: Path, names: list[str], threads: int) -> None:
    """Median latency of each file and provider, per image."""
    import numpy as np

    from export.predict import Predictor

    for name in names:
        predictor = Predictor(out / name, threads)
        size = predictor.preprocessing.img_size
        for batch in (1, 32):
            pixels = np.zeros((batch, size, size, 3), np.uint8)
            seconds = []
            for _ in range(3 + (30 if batch == 1 else 5)):
                started = time.perf_counter()
                predictor.logits(pixels)
                seconds.append(time.perf_counter() - started)
            median = 1000 * statistics.median(seconds[3:]) / batch
            print(
                f"{name:<16} batch {batch:>2}: {median:7.2f} ms per image, {threads} threads, {predictor.providers[0]}"
            )
