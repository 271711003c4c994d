"""What a run works with, built from its config: data, model, loaders, run folder."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from export.predict import Preprocessing
from resnet_dist.config.schema import TrainConfig
from resnet_dist.config.stored import portable
from resnet_dist.data.check import Finding, usable
from resnet_dist.data.index import ImageIndex, read_index
from resnet_dist.data.loader import (
    EvalImages,
    EvalLoader,
    Samples,
    Share,
    TrainBatches,
    TrainImages,
    TrainLoader,
    default_workers,
)
from resnet_dist.data.preprocess import preprocessing
from resnet_dist.data.transforms import ToInput, Transform, stream_seed
from resnet_dist.errors import UsageError
from resnet_dist.files.header import random_stream_of
from resnet_dist.files.run import RunFolder
from resnet_dist.model import weights
from resnet_dist.model.batch_norm import choose_sync_bn
from resnet_dist.model.checkpoint import Description, start_from
from resnet_dist.model.resnet import Architecture, build, empty
from resnet_dist.model.start import StartingPoint
from resnet_dist.model.trainable import batch_norm_of_one_value, updating_batch_norms
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import on_main, share_weights
from resnet_dist.runtime.display import Display
from resnet_dist.runtime.signals import StopRequests
from resnet_dist.runtime.wording import counted
from resnet_dist.training.caching import place_samples
from resnet_dist.training.ema import Ema
from resnet_dist.training.losses import Loss, class_weights
from resnet_dist.training.phases import plan, plan_lines, resolve
from resnet_dist.training.state import Best


@dataclass
class Job:
    """What a run works with; none of it changes but the weights of `model` and `ema`."""

    accelerator: Accelerator
    cfg: TrainConfig
    index: ImageIndex
    spec: Preprocessing
    architecture: Architecture
    model: nn.Module
    ema: Ema | None
    loss: Loss
    train_images: TrainImages
    train_loader: TrainLoader
    val_loader: EvalLoader
    workers: int
    to_input: ToInput
    run: RunFolder
    display: Display
    stop: StopRequests

    def described(self, best: Best) -> Description:
        """What the best checkpoint says of itself."""
        return Description(
            architecture=self.architecture,
            classes=self.index.classes,
            preprocessing=self.spec,
            config=portable(self.cfg),
            epoch=best.epoch,
            score=best.score,
            weights_kind=best.weights_kind,
        )


@dataclass(frozen=True)
class Blueprint:
    """Everything that is decided before memory is taken: what `--dry-run` prints and what a Job is built from."""

    cfg: TrainConfig  # nothing automatic left that shapes the result
    index: ImageIndex
    architecture: Architecture
    spec: Preprocessing
    batches: TrainBatches
    reasons: tuple[str, ...]
    bad_images: tuple[Finding, ...] = ()
    train_transform: Transform | None = None  # of the user, with `--aug custom`

    def lines(self) -> list[str]:
        """The plan in words: data, phases, learning rates."""
        index, share = self.index, self.batches.share
        images = f"{len(index.train)} training and {counted(len(index.val), 'validation image')}"
        data = f"{counted(len(index.classes), 'class')}, {images}"
        parts = f"{share.batch_size} per process x {counted(share.world, 'process')} x {share.accumulate} accumulated"
        batch = f"global batch {share.global_batch} = {parts}"
        plans = plan(self.cfg, empty(self.architecture), self.batches.steps_per_epoch)
        bad = [f"WARNING: {counted(len(self.bad_images), 'unusable image')} left out"] if self.bad_images else []
        return [data, *index.notes, *bad, batch, *self.reasons, *plan_lines(plans, self.cfg)]


def draw(accelerator: Accelerator, cfg: TrainConfig, train_transform: Transform | None = None) -> Blueprint:
    """Find the images, decide what is automatic, and check that it fits together. Raises UsageError, DataError."""
    if (cfg.augment.aug == "custom") != (train_transform is not None):
        raise UsageError(
            "--aug custom needs a transform that is given in Python: resnet_dist.train(..., train_transform=...)"
        )
    index, bad = on_main(accelerator, lambda: usable(read_index(cfg.data), cfg.data))
    architecture = Architecture.of(cfg.model, len(index.classes))
    cfg = with_batch_size(cfg, accelerator.num_processes)
    cfg, notes = with_random_stream(accelerator, cfg)
    share = Share(cfg.data.batch_size, cfg.optim.grad_accum, accelerator.num_processes, accelerator.process_index)
    cfg, reasons = resolve(cfg, empty(architecture), share.global_batch)
    seed = stream_seed(cfg.run.seed, cfg.run.random_stream)
    batches = TrainBatches(len(index.train), seed, share, cfg.data.drop_last)
    spec = on_main(accelerator, lambda: preprocessing(cfg.preprocess, _weights_preprocessing(cfg)))
    check_batch_norm(accelerator, cfg, architecture, spec.img_size)
    return Blueprint(cfg, index, architecture, spec, batches, (*reasons, *notes), tuple(bad), train_transform)


def with_batch_size(cfg: TrainConfig, processes: int) -> TrainConfig:
    """The config with a batch size that fits the global one, if that is given, else the other way round.

    The global one is kept with the run: resumed by another number of processes, it is divided among those. Raises
    UsageError where it is not a multiple.
    """
    parts = processes * cfg.optim.grad_accum
    wanted = cfg.data.global_batch_size or cfg.data.batch_size * parts
    if wanted % parts:
        how = f"{counted(processes, 'process')} x {counted(cfg.optim.grad_accum, 'accumulated batch')}"
        raise UsageError(f"--global-batch-size {wanted}: not a multiple of {parts} ({how})")
    problems = list(cfg.problems_of_batch(wanted // parts))
    if problems:
        raise UsageError(problems)
    data = dataclasses.replace(cfg.data, batch_size=wanted // parts, global_batch_size=wanted)
    return dataclasses.replace(cfg, data=data)


def with_random_stream(accelerator: Accelerator, cfg: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The config with the random stream decided, and the reason: a run from an old one must not repeat its samples.

    Raises ArtifactError where the old checkpoint cannot be read.
    """
    old = cfg.run.init_from
    if cfg.run.random_stream is not None or old is None:
        return cfg, []
    stream = 1 + on_main(accelerator, lambda: random_stream_of(old))
    run = dataclasses.replace(cfg.run, random_stream=stream)
    reason = f"random stream {stream} (automatic: the run that this one starts from had {stream - 1})"
    return dataclasses.replace(cfg, run=run), [reason]


def check_batch_norm(accelerator: Accelerator, cfg: TrainConfig, architecture: Architecture, size: int) -> None:
    """Raises UsageError where in a phase a BatchNorm would train on one value per channel: torch cannot."""
    batch = cfg.data.batch_size
    if batch > 1:
        return
    model = empty(architecture)
    trains = any(updating_batch_norms(model, phase) for phase in cfg.phase)
    if choose_sync_bn(cfg.system.sync_bn, accelerator, trains, batch).on and accelerator.num_processes > 1:
        return
    for number, phase in enumerate(cfg.phase, 1):
        layer = batch_norm_of_one_value(empty(architecture), phase, (batch, 3, size, size))
        if layer is not None:
            raise UsageError(
                f"--batch-size {batch}: in phase {number} BatchNorm {layer} would see one value per channel and image "
                f"of {size} pixels, and cannot compute a variance; take at least 2 images per process"
            )


def start_of(cfg: TrainConfig) -> StartingPoint:
    """Where the weights of a new run come from."""
    return StartingPoint.of(cfg.model.weights, cfg.run.init_from)


def check_weights(blueprint: Blueprint) -> None:
    """Look at names, shapes and types in the weights file of a new run, if it has one, before anything is made.

    Raises ArtifactError where it is missing, damaged or of another network.
    """
    file = start_of(blueprint.cfg).file
    if file is not None:
        weights.check_backbone(weights.read_tensors(file, "meta"), blueprint.architecture, str(file))


def _weights_preprocessing(cfg: TrainConfig) -> Preprocessing:
    file = start_of(cfg).file
    if file is not None:
        return weights.preprocessing_in(file)
    return weights.preprocessing_of(weights.named_weights(cfg.model))


def build_job(
    accelerator: Accelerator,
    blueprint: Blueprint,
    run: RunFolder,
    display: Display,
    stop: StopRequests,
    resumed: bool = False,
) -> Job:
    """Build the network, load its weights (a resumed run has its own) and open the data.

    Raises what reading weights can raise.
    """
    cfg, index, spec = blueprint.cfg, blueprint.index, blueprint.spec
    device = accelerator.device
    torch.manual_seed(cfg.run.seed)
    model = build(blueprint.architecture)
    batch_norm_trains = any(updating_batch_norms(model, phase) for phase in cfg.phase)
    sync = choose_sync_bn(cfg.system.sync_bn, accelerator, batch_norm_trains, cfg.data.batch_size)
    if sync.on:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        display.say(f"BatchNorm over all processes ({sync.why})")
    if not resumed:
        loaded = on_main(accelerator, lambda: _load_weights(model, cfg, blueprint.architecture, index.classes))
        display.say(loaded)
    share_weights(accelerator, model)  # only the main process read them
    workers = cfg.data.workers
    if workers is None:
        workers = default_workers(device, launcher.local_world_size())
    on_gpu = device.type == "cuda"
    balance = class_weights(cfg.loss, index.classes, index.train.targets)
    train_images = TrainImages(index.train, spec, cfg.augment, blueprint.batches.seed, blueprint.train_transform)
    val_images = EvalImages(index.val, spec)
    train_samples, val_samples, augment = place_samples(
        accelerator, cfg, train_images, val_images, workers, display.say
    )
    return Job(
        accelerator=accelerator,
        cfg=cfg,
        index=index,
        spec=spec,
        architecture=blueprint.architecture,
        model=model,
        ema=Ema(model, cfg.run.ema_decay) if cfg.run.ema else None,
        loss=Loss(cfg.loss, None if balance is None else balance.to(device)),
        train_images=train_images,
        train_loader=TrainLoader(train_samples, blueprint.batches, workers, pin_memory=on_gpu),
        val_loader=eval_loader(accelerator, cfg, val_samples, workers),
        workers=workers,
        to_input=ToInput(spec, device, augment),
        run=run,
        display=display,
        stop=stop,
    )


def eval_loader(accelerator: Accelerator, cfg: TrainConfig, samples: Samples, workers: int) -> EvalLoader:
    """This process's part of the samples, in the order of their table."""
    return EvalLoader(
        samples,
        cfg.data.eval_batch_size or cfg.data.batch_size,
        workers,
        pin_memory=accelerator.device.type == "cuda",
        world=accelerator.num_processes,
        rank=accelerator.process_index,
    )


def _load_weights(model: nn.Module, cfg: TrainConfig, architecture: Architecture, classes: Sequence[str]) -> str:
    """Put the weights that the config names into the network. Returns a line that says which."""
    start = start_of(cfg)
    if not start.pretrained:
        return "weights: random"
    if start.kind == "run" and start.file is not None:
        return start_from(start.file, model, architecture, classes)
    named = weights.named_weights(cfg.model)
    file = weights.download(named.url) if named is not None else Path(start.source)
    weights.load_backbone(model, weights.read_tensors(file), architecture, str(file))
    return f"weights: backbone of {file}, new head"
