"""`resnet-dist bench`: measure the machine, training, loading and prediction, one after the other."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.predict import Predictor
from export.run import ExportConfig, run_export
from resnet_dist.bench.frame import Result, Setup, run_measurement
from resnet_dist.bench.loading import fastest, loading
from resnet_dist.bench.machine import describe, roofs
from resnet_dist.bench.options import BenchConfig
from resnet_dist.bench.report import lines, verdict
from resnet_dist.bench.timing import Repeats, summary
from resnet_dist.bench.training import STEPS_PER_WORKER, job_of, measure_regime, shortened
from resnet_dist.data.device_augment import DrawnImages
from resnet_dist.data.loader import DeviceImages
from resnet_dist.model.checkpoint import save_best
from resnet_dist.runtime.accelerate import on_main
from resnet_dist.training.job import Job
from resnet_dist.training.state import Best

FORMAT_VERSION = 1


def run_bench(cfg: BenchConfig) -> None:
    """Measure, print the report and write the JSON file. Every process must call this. Raises ResnetDistError."""
    run_measurement(cfg, lambda setup: measure(cfg, setup))


def measure(cfg: BenchConfig, setup: Setup) -> Result:
    """All measurements, as plain JSON values and as text."""
    repeats = repeats_of(cfg, setup.accelerator.device.type)
    report, job = measure_training(cfg, setup, repeats)
    report["settings"]["data"] = "synthetic" if cfg.data.data is None else "images"
    if cfg.predict:
        setup.say("measuring prediction ...")
        report["predict"] = on_main(setup.accelerator, lambda: time_prediction(job, setup.folder, repeats))
    return Result(report, list(lines(report)))


def repeats_of(cfg: BenchConfig, device: str) -> Repeats:
    """How long to measure on this type of device."""
    warmup = cfg.warmup_steps if cfg.warmup_steps is not None else 20 if device == "cuda" else 2
    return Repeats(cfg.windows, cfg.window_steps, warmup)


def measure_training(cfg: BenchConfig, setup: Setup, repeats: Repeats) -> tuple[dict[str, Any], Job]:
    """The measurements of the machine, of every regime and of loading, and the job that measured loading."""
    accelerator, say = setup.accelerator, setup.say
    plan = shortened(accelerator, setup.cfg, setup.steps)
    report: dict[str, Any] = {"format_version": FORMAT_VERSION, "machine": describe(accelerator)}
    say("measuring matrix products and memory ...")
    report["roofs"] = roofs(accelerator, repeats)
    report["regimes"] = {}
    for name in cfg.regimes:
        say(f"measuring training, {name} ...")
        job = job_of(accelerator, plan)
        report["regimes"][name] = measure_regime(job, name, repeats, cfg.epochs, report["roofs"])
    say("measuring loading ...")
    job = job_of(accelerator, plan)
    report["settings"] = settings(job)
    report["loading"] = loading(job, repeats)
    for regime in report["regimes"].values():
        if not regime["features_are_kept"]:
            regime["training"]["overlap"] = overlap(report, regime)
    report["notes"] = list(notes(job))
    report["verdict"] = verdict(report)
    return report, job


def settings(job: Job) -> dict[str, Any]:
    """The settings that were measured, enough to repeat the measurement."""
    cfg = job.plan.cfg
    return {
        "model": cfg.model.model,
        "img_size": job.plan.spec.img_size,
        "batch_size": job.plan.share.batch_size,
        "grad_accum": cfg.optim.grad_accum,
        "precision": str(job.accelerator.mixed_precision),
        "optimizer": cfg.optim.opt,
        "aug": cfg.augment.aug,
        "workers": job.plan.workers,
        "compile": cfg.system.compile,
        "images_are_kept": job.train_images.read is not job.train_images.reader,
        "training_images": len(job.plan.index.train),
        "classes": len(job.plan.index.classes),
    }


def overlap(report: dict[str, Any], regime: dict[str, Any]) -> float:
    """The speed of training divided by that of the slower of loading alone and computing alone; at best 1."""
    load = fastest(report["loading"])["loader"]["images_per_second"]
    processes = report["machine"]["processes"]
    alone = processes * min(load, regime["compute"]["step"]["images_per_second"])
    return float(regime["training"]["later_epochs"]["images_per_second"] / alone)


def notes(job: Job) -> Iterator[str]:
    """Lines about what the numbers of training and loading do not measure."""
    steps, workers = job.train_loader.steps_per_epoch, job.plan.workers
    if steps < STEPS_PER_WORKER * workers and not isinstance(job.train_loader.samples, DeviceImages):
        yield (
            f"epochs of {steps} steps with {workers} loader processes measure how the loaders start up; for their "
            f"steady speed use --epoch-steps {STEPS_PER_WORKER * workers} or more, and enough images"
        )
    if job.plan.cfg.data.cache == "device" and not isinstance(job.train_loader.samples, (DeviceImages, DrawnImages)):
        yield f"on a {job.accelerator.device.type}, --cache device caches images in memory, not on the device"


def time_prediction(job: Job, folder: Path, repeats: Repeats) -> dict[str, Any]:
    """Export the untrained model, and time the predictor from a batch of files to labels; its start separately."""
    checkpoint = folder / "bench.safetensors"
    save_best(checkpoint, job.model, job.plan.description(Best({}, 0, "raw")))
    run_export(ExportConfig(run=str(checkpoint), output_dir=str(folder / "export"), images=1), verbose=False)
    table = job.plan.index.train
    files = [table.path(i) for i in range(min(len(table), job.plan.share.batch_size))]
    start = time.perf_counter()
    predictor = Predictor(folder / "export" / "model.onnx", providers="cpu")
    list(predictor.predict(files))
    first = time.perf_counter() - start
    seconds = []
    for _ in range(repeats.windows):
        start = time.perf_counter()
        list(predictor.predict(files))
        seconds.append(time.perf_counter() - start)
    return {**summary(seconds, 1).of_images(len(files)), "seconds_to_first_labels": first}
