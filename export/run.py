"""Export a checkpoint to ONNX and verify it against PyTorch."""

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.model_files import REPORT, Say, write_model_files
from resnet_dist.config.fields import option, out_of_range, required
from resnet_dist.config.foreign import ForeignConfig
from resnet_dist.config.layers import from_keywords, keyword_signature
from resnet_dist.errors import ArtifactError, MachineError, python_errors
from resnet_dist.files.weights_file import HUB, located, names_weights
from resnet_dist.runtime.notebook import html_table

MIN_CALIBRATION = 64
MIN_AGREEMENT = 90.0


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a run's best checkpoint to ONNX and verify every file against PyTorch before it is saved."""

    run: str | None = option(None, positional=True)
    """A run folder or a checkpoint (.safetensors) of resnet-dist; or the weights of another trainer: a file, a folder
    in the layout of the Hugging Face Hub, or hf://REPOSITORY."""
    data: str | None = None
    """Images to verify on, a folder or a manifest (default: the validation part of the run's own data)."""
    output_dir: str | None = option(None, "-o", "--output")
    """The folder to write (default: export in the run folder, or next to the checkpoint)."""
    overwrite: bool = False
    """Replace an existing export."""
    preprocess_in_graph: bool = option(False, "--with-preprocess")
    """The graph takes uint8 images and normalises them itself; it also outputs probabilities."""
    embeddings: bool = False
    """The graph also outputs the features (the input of the head), for `predict --embed`."""
    opset: int = 18
    """ONNX opset of the files, 18 to 23. onnxruntime 1.15 and later run 18; `onnx.reference` reads int8 from 19 on."""
    fp16: bool = option(False, "--half")
    """Also write model.fp16.onnx."""
    int8: bool = False
    """Also write model.int8.onnx, calibrated on training images. It is kept only if it passes --min-agreement and
    --max-accuracy-drop."""
    reduce_range: bool = True
    """Use 7-bit weights in int8. Without it, x86 CPUs that lack VNNI can give other results."""
    calibration_images: int = 128
    """Number of training images for int8: half of them measure ranges and round weights, half choose the method."""
    images: int = 64
    """Number of validation images on which the float32 file is verified, and which gate.json records."""
    full: bool = False
    """Verify the float32 file on all validation images."""
    min_agreement: float = MIN_AGREEMENT
    """Percent of the validation images on which int8 must predict the same class as float32, with 95 % confidence."""
    max_accuracy_drop: float = 1.0
    """Percentage points of top-1 accuracy that int8 may lose, at the lower end of the 95 % interval."""
    providers: str = "auto"
    """onnxruntime providers, such as cpu,cuda,openvino: every file is verified with each of them (default: those with
    which `predict` starts on this machine)."""
    openvino: bool = False
    """Also write model.openvino.xml and .bin, the float32 network as OpenVINO IR, verified with OpenVINO on the CPU.
    Needs `pip install 'resnet-dist[openvino]'`."""
    triton: bool = False
    """Also write triton, a model repository for NVIDIA's Triton Inference Server."""
    web: bool = False
    """Also write web, a static page that classifies pictures in the browser; needs the npm package onnxruntime-web."""
    onnxruntime_web: str | None = None
    """The folder of the npm package onnxruntime-web for --web (default: node_modules/onnxruntime-web)."""
    time: bool = False
    """Measure the latency of every file for batches of 1 and 32."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    foreign: ForeignConfig = ForeignConfig()

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder or a checkpoint"
        elif self.run.startswith(HUB) and self.output_dir is None:
            yield f"--output-dir is missing: it is needed if RUN is {HUB}REPOSITORY"
        yield from out_of_range(self, 1, math.inf, "images", "threads")
        yield from out_of_range(self, MIN_CALIBRATION, math.inf, "calibration_images")
        yield from out_of_range(self, 18, 23, "opset")
        yield from out_of_range(self, 0, 100, "max_accuracy_drop", "min_agreement")
        if not self.reduce_range and not self.int8:
            yield "--no-reduce-range needs --int8"
        if self.onnxruntime_web is not None and not self.web:
            yield "--onnxruntime-web needs --web"


@dataclass(frozen=True)
class Bundle:
    """A finished export.

    Attributes:
        path: the folder.
        model: the float32 file, model.onnx.
        files: all model files with their size in MiB; that of an OpenVINO file includes its weights.
        report: the results of the verification, as in export_report.json.
        latency: file -> batch size -> median milliseconds per image; empty unless it was measured.
    """

    path: Path
    model: Path
    files: Mapping[Path, float]
    report: Mapping[str, Any]
    latency: Mapping[str, Mapping[int, float]]

    def __fspath__(self) -> str:
        """The float32 file, so that a Bundle can be used as the path of a model."""
        return str(self.model)

    def _repr_html_(self) -> str:
        rows = [(file.name, f"{size} MiB") for file, size in self.files.items()]
        return html_table(f"Export {self.path}", [*rows, ("verified on", f"{self.report['gate_images']} images")])


def export(run: str | os.PathLike[str], *, verbose: bool = False, **settings: Any) -> Bundle:
    """Export the best checkpoint of a run to ONNX and verify it against PyTorch.

    `run` is a Run, a run folder, a checkpoint (.safetensors) or the weights of another trainer. The keywords are the
    options of `resnet-dist export`, with underscores: `export(run, int8=True)`. With `verbose`, the result of every
    check is printed. Raises ArtifactError if a file is refused (files that passed are still written), UsageError,
    DataError or MachineError.
    """
    with python_errors():
        return run_export(from_keywords(ExportConfig, {"run": run, **settings}), verbose)


export.__signature__ = keyword_signature(ExportConfig, verbose=False)  # type: ignore[attr-defined]


def run_export(cfg: ExportConfig, verbose: bool = True) -> Bundle:
    """Export and verify, then move the files into place; no partial export is left. With `verbose`, print the checks.

    Raises ResnetDistError: ArtifactError if a file is refused, after the files that passed are in place.
    """
    import torch

    from export.browser import find_runtime
    from export.bundle import check_target
    from export.openvino_ir import check_installed
    from resnet_dist.files.outputs import inside
    from resnet_dist.model.foreign import load_model, origin_lines
    from resnet_dist.runtime import environment as launcher
    from resnet_dist.runtime.isolation import process_settings_restored

    say: Say = print if verbose else lambda _: None
    threads = cfg.threads or launcher.cores()
    source = required(cfg.run, "RUN")
    is_file = Path(source).is_file() or names_weights(source)
    checkpoint = located(source) if is_file else Path(source) / "checkpoints" / "best.safetensors"
    run = checkpoint if is_file else Path(source)
    cfg = replace(cfg, run=str(run))
    out = Path(cfg.output_dir) if cfg.output_dir else inside(run if run.is_dir() else run.parent, "export")
    check_target(out, cfg.overwrite)
    if cfg.web:
        find_runtime(cfg.onnxruntime_web)
    if cfg.openvino:
        check_installed()
    with process_settings_restored():
        torch.set_num_threads(threads)
        model, description = load_model(checkpoint, cfg.foreign)
        for line in origin_lines(description):
            say(line)
        report = write_bundle(out, lambda staging: write_model_files(staging, cfg, checkpoint, model, description, say))
        files = {name: size for name, size in report["files_mib"].items() if name not in report["refused"]}
        say(f"written to {out}: {', '.join(f'{name} ({size} MiB)' for name, size in files.items())}")
        if report["refused"]:
            passed = ", ".join(files)
            raise ArtifactError(f"the gate refused {report['problems'][0]}; {passed} passed and is in {out}")
        latency = measure_latency(out, list(files), threads, say) if cfg.time else {}
    return Bundle(out, out / "model.onnx", {out / name: size for name, size in files.items()}, report, latency)


def write_bundle(out: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `fill` write an export into a temporary folder, and move it to `out`. Returns the report of `fill`.

    Raises ArtifactError if model.onnx is refused, or if another file is refused and `out` already holds an export,
    which then stays; MachineError if `out` cannot be written.
    """
    from export.bundle import put_in_place

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".tmp-export-", dir=out.parent))
        staging.chmod(out.parent.stat().st_mode & 0o777)
    except OSError as error:
        raise MachineError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        report = fill(staging)
        had_export = (out / "model.onnx").exists()  # it is not replaced if a file is refused
        written = report["passed"] or not (had_export or "model.onnx" in report["refused"])
        if written:
            put_in_place(staging, out)
        else:
            report_file = keep_report(staging, out)
    except OSError as error:
        raise MachineError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if not written:
        stays = "; the existing export is unchanged" if report_file.name != REPORT else ""
        raise ArtifactError(
            f"the gate refused the export: {report['problems'][0]}{stays}; all reasons are in {report_file}"
        )
    return report


def keep_report(staging: Path, out: Path) -> Path:
    """Save only the report of a refused export and return its path. An existing export is not changed."""
    out.mkdir(exist_ok=True)
    file = out / ("export_report.failed.json" if (out / "model.onnx").exists() else REPORT)
    shutil.copyfile(staging / REPORT, file)
    return file


def measure_latency(out: Path, names: Sequence[str], threads: int, say: Say) -> dict[str, dict[int, float]]:
    """The median latency of each file in milliseconds per image, for batches of 1 and 32."""
    import numpy as np

    from export.openvino_ir import FILE, OpenVinoPredictor
    from export.predict import Predictor

    latency: dict[str, dict[int, float]] = {}
    for name in names:
        predictor = OpenVinoPredictor(out / name, threads) if name == FILE else Predictor(out / name, threads)
        size = predictor.preprocessing.img_size
        latency[name] = {}
        for batch in (1, 32):
            pixels = np.zeros((batch, size, size, 3), np.uint8)
            seconds = []
            for _ in range(3 + (30 if batch == 1 else 5)):
                started = time.perf_counter()
                predictor.logits(pixels)
                seconds.append(time.perf_counter() - started)
            median = latency[name][batch] = 1000 * statistics.median(seconds[3:]) / batch
            say(f"{name:<16} batch {batch:>2}: {median:7.2f} ms per image, {threads} threads, {predictor.providers[0]}")
    return latency
