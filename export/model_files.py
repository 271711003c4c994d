"""Write the model files of an export, and verify them before they are kept."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import nn

    from export.run import ExportConfig
    from export.verify import Equality, Loss, Records
    from resnet_dist.data.index import ImageTable
    from resnet_dist.model.checkpoint import Description

Say = Callable[[str], None]
REPORT = "export_report.json"


def write_model_files(
    staging: Path, cfg: "ExportConfig", checkpoint: Path, model: "nn.Module", description: "Description", say: Say
) -> dict[str, Any]:
    """Write the model files, verify them, and remove those that are refused. Returns the report.

    If model.onnx passes, the side files are written too. Raises ResnetDistError.
    """
    from export.bundle import sizes
    from export.gate_images import calibration_inputs, gate_images
    from export.providers import providers_to_verify, runtime_lines, runtime_of
    from resnet_dist.files.run import to_json

    providers = providers_to_verify(cfg.providers)
    runtime = runtime_of(providers)
    with tempfile.TemporaryDirectory(prefix="resnet-dist-gate-") as folder:
        table, source = gate_images(cfg, description, Path(folder))
        labelled = source != "synthetic"
        hint = "" if labelled else "; give --data for real ones"
        say(f"verifying on {source} images ({len(table)} available){hint}")
        for line in runtime_lines(runtime):
            say(line)
        # Images are read before the slow steps, so that an error comes early.
        inputs = calibration_inputs(cfg, description) if cfg.int8 else []
        graph, metadata = float_graph(cfg, checkpoint, model, description, providers, say)
        reports, records = float_files(staging, cfg, model, graph, metadata, table, labelled, say)
        quantization: dict[str, Any] = {}
        for name, small, how in smaller_graphs(cfg, graph, inputs, say):
            quantization |= how
            reports[name] = smaller_file(staging, name, cfg, small, metadata, table, labelled)
            say_results(name, reports[name], say)
    measured = {"files_mib": sizes(staging, list(reports)), "runtime": runtime}
    report = report_of(reports, source) | measured | quantization
    (staging / REPORT).write_text(to_json(report))
    finish(staging, cfg, report["refused"], metadata, records if labelled else None)
    return report


def float_graph(
    cfg: "ExportConfig",
    checkpoint: Path,
    model: "nn.Module",
    description: "Description",
    providers: Sequence[str],
    say: Say,
) -> "tuple[onnx.ModelProto, dict[str, Any]]":
    """The float32 graph, and the metadata of its file."""
    from export.to_onnx import describe, graph_of, self_test_logits
    from resnet_dist.evaluation.calibrate import read_calibration

    calibration = read_calibration(checkpoint, len(description.classes))
    temperature = calibration.temperature if calibration else 1.0
    say(f"temperature {temperature:.4f} (calibration.json)" if calibration else "not calibrated")
    in_graph, spec = cfg.preprocess_in_graph, description.preprocessing
    graph = graph_of(model, spec, in_graph, temperature, cfg.embeddings, cfg.opset)
    expected = self_test_logits(model, spec)
    return graph, describe(description, checkpoint, "fp32", in_graph, expected, calibration, providers)


def float_files(
    staging: Path,
    cfg: "ExportConfig",
    model: "nn.Module",
    graph: "onnx.ModelProto",
    metadata: dict[str, Any],
    table: "ImageTable",
    labelled: bool,
    say: Say,
) -> "tuple[dict[str, Mapping[str, Equality | Loss]], Records]":
    """Write the files that must equal PyTorch, and compare all of them with one pass of PyTorch over the images.

    Returns file -> provider -> result, and the records for gate.json.
    """
    import torch

    from export.openvino_ir import FILE, OpenVinoPredictor, write_ir
    from export.predict import Predictor
    from export.verify import check_equality

    file, providers, threads = staging / "model.onnx", metadata["verified_with"], torch.get_num_threads()
    write_model(file, graph, metadata)
    predictors = [Predictor(file, threads, name) for name in providers]
    names = [(file.name, name) for name in providers]
    if cfg.openvino:
        say(f"{FILE} runs with {write_ir(file, staging / FILE)}")
        predictors.append(OpenVinoPredictor(staging / FILE, threads))
        names.append((FILE, "openvino"))
    some = table.take(table.spread(len(table) if cfg.full else cfg.images))
    results, records = check_equality(model, some, predictors, labelled, metadata["temperature"], cfg.images)
    reports: dict[str, dict[str, Equality | Loss]] = {}
    for (name, provider), result in zip(names, results, strict=True):
        reports.setdefault(name, {})[provider] = result
    for name in reports:
        say_results(name, reports[name], say)
    return {**reports}, records


def smaller_file(
    staging: Path,
    name: str,
    cfg: "ExportConfig",
    graph: "onnx.ModelProto",
    metadata: dict[str, Any],
    table: "ImageTable",
    labelled: bool,
) -> "Mapping[str, Loss]":
    """Write a fp16 or int8 file, and compare it with the float32 file. Returns the result of each provider."""
    from export.to_onnx import runtime_logits
    from export.verify import compare_smaller

    own = [float(logit) for logit in runtime_logits(graph, self_test_feed(staging))[0]]
    write_model(staging / name, graph, metadata | {"precision": name.split(".")[1], "self_test": own})
    limits = (cfg.max_accuracy_drop, cfg.min_agreement)
    files = (staging / "model.onnx", staging / name)
    return compare_smaller(*files, table, labelled, *limits, metadata["verified_with"])


def finish(
    staging: Path, cfg: "ExportConfig", refused: Sequence[str], metadata: dict[str, Any], records: "Records | None"
) -> None:
    """Remove the refused files. If model.onnx is not one of them, write all that is made from it.

    `records` are those for gate.json; None for synthetic images, which are gone.
    """
    from export.browser import find_runtime, write_web
    from export.bundle import write_side_files
    from export.openvino_ir import parts
    from export.predict import GATE
    from export.triton import write_triton

    for part in (part for name in refused for part in parts(staging / name)):
        part.unlink()
    if "model.onnx" in refused:
        return
    write_side_files(staging, metadata)
    if cfg.triton:
        write_triton(staging, metadata["architecture"])
    if cfg.web:
        write_web(staging, find_runtime(cfg.onnxruntime_web))
    if records is not None:
        records.save(staging / GATE, metadata["checkpoint_sha256"], cfg.min_agreement)


def report_of(reports: Mapping[str, Mapping[str, Any]], source: str) -> dict[str, Any]:
    """The content of export_report.json about the results of each file with each provider."""
    problems = [
        f"{name}{f' with {provider}' if len(results) > 1 else ''}: {problem}"
        for name, results in reports.items()
        for provider, result in results.items()
        for problem in result.problems
    ]
    refused = [name for name, results in reports.items() if any(result.problems for result in results.values())]
    return {
        "passed": not refused,
        "refused": refused,
        "problems": problems,
        "gate_images": source,
        **{name: {on: result.to_dict() for on, result in results.items()} for name, results in reports.items()},
    }


def say_results(name: str, results: Mapping[str, Any], say: Say) -> None:
    """One line per provider."""
    for provider, result in results.items():
        say(f"{name:<16} {provider}: {result}")


def write_model(file: Path, graph: "onnx.ModelProto", metadata: dict[str, Any]) -> None:
    """Write a model with its metadata."""
    from export.to_onnx import finished

    file.write_bytes(finished(graph, metadata))


def self_test_feed(staging: Path) -> "dict[str, np.ndarray]":
    """The image of the self-test as the input of the graphs of this export."""
    from export.predict import Predictor, self_test_pixels

    predictor = Predictor(staging / "model.onnx", providers="cpu")
    return predictor.inputs(self_test_pixels(predictor.preprocessing.img_size))


def smaller_graphs(
    cfg: "ExportConfig", graph: "onnx.ModelProto", inputs: "list[np.ndarray]", say: Say
) -> "Iterator[tuple[str, onnx.ModelProto, dict[str, Any]]]":
    """Yield (file name, graph, how it was quantized) of the graphs that `cfg` selects. `inputs` calibrate int8."""
    from export.quantize import may_saturate, to_fp16, to_int8

    if cfg.fp16:
        yield "model.fp16.onnx", to_fp16(graph), {}
    if cfg.int8:
        small, choice = to_int8(graph, inputs, cfg.reduce_range)
        say(f"{'model.int8.onnx':<16} {choice}")
        if may_saturate(small):
            say(f"{'model.int8.onnx':<16} 8-bit weights: x86 CPUs without VNNI can predict other classes")
        yield "model.int8.onnx", small, {"quantization": asdict(choice)}
