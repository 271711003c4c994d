"""A job: what a training works with, built from its plan (network, loaders, loss, run folder)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from resnet_dist.config.schema import TrainConfig
from resnet_dist.data.device_augment import SpreadImages
from resnet_dist.data.loader import EvalImages, EvalLoader, Samples, TrainImages, TrainLoader
from resnet_dist.data.transforms import ToInput
from resnet_dist.files.run import RunFolder
from resnet_dist.model import weights
from resnet_dist.model.checkpoint import start_from
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.runtime.accelerate import on_main, share_weights
from resnet_dist.runtime.display import Display
from resnet_dist.runtime.signals import StopRequests
from resnet_dist.training.caching import place_samples
from resnet_dist.training.ema import Ema
from resnet_dist.training.losses import Loss, class_weights
from resnet_dist.training.plan import Plan, start_of


@dataclass
class Job:
    """What a training works with. Only the weights of `model` and `ema` change."""

    accelerator: Accelerator
    plan: Plan
    model: nn.Module
    ema: Ema | None
    loss: Loss
    train_images: TrainImages
    train_loader: TrainLoader
    val_loader: EvalLoader
    to_input: ToInput
    run: RunFolder
    display: Display
    stop: StopRequests


def check_weights(plan: Plan) -> None:
    """Check names, shapes and types in the weights file of a new run, if it has one, before anything is created.

    Raises ArtifactError if it is missing, damaged or of another network.
    """
    file = start_of(plan.cfg).file
    if file is not None:
        weights.check_backbone(weights.read_tensors(file, "meta"), plan.architecture, str(file))


def build_job(
    accelerator: Accelerator,
    plan: Plan,
    run: RunFolder,
    display: Display,
    stop: StopRequests,
    resumed: bool = False,
) -> Job:
    """Build the network, load its weights (those of a resumed run come later) and open the data.

    Raises the errors of reading weights.
    """
    cfg, index, device = plan.cfg, plan.index, accelerator.device
    torch.manual_seed(cfg.run.seed)
    model = build(plan.architecture)
    if plan.sync_bn.on:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        display.say(f"BatchNorm over all processes ({plan.sync_bn.why})")
    if not resumed:
        loaded = on_main(accelerator, lambda: _load_weights(model, cfg, plan.architecture, index.classes))
        display.say(loaded)
    share_weights(accelerator, model)  # only the main process read them
    balance = class_weights(cfg.loss, index.classes, index.train.targets)
    train_images = TrainImages(index.train, plan.spec, cfg.augment, plan.batches.seed, plan.train_transform)
    val_images = EvalImages(index.val, plan.spec)
    train_samples, val_samples, augment = place_samples(
        accelerator, cfg, train_images, val_images, plan.workers, plan.share, display.say
    )
    batches = plan.batches.of_all_processes() if isinstance(train_samples, SpreadImages) else plan.batches
    return Job(
        accelerator=accelerator,
        plan=plan,
        model=model,
        ema=Ema(model, cfg.run.ema_decay) if cfg.run.ema else None,
        loss=Loss(cfg.loss, None if balance is None else balance.to(device)),
        train_images=train_images,
        train_loader=TrainLoader(train_samples, batches, plan.workers, pin_memory=device.type == "cuda"),
        val_loader=eval_loader(accelerator, plan.eval_batch_size, val_samples, plan.workers),
        to_input=ToInput(plan.spec, device, augment),
        run=run,
        display=display,
        stop=stop,
    )


def eval_loader(accelerator: Accelerator, batch_size: int, samples: Samples, workers: int) -> EvalLoader:
    """The loader of this process's part of the samples, in the order of their table."""
    return EvalLoader(
        samples,
        batch_size,
        workers,
        pin_memory=accelerator.device.type == "cuda",
        world=accelerator.num_processes,
        rank=accelerator.process_index,
    )


def _load_weights(model: nn.Module, cfg: TrainConfig, architecture: Architecture, classes: Sequence[str]) -> str:
    """Load the weights that the settings name into the network. Returns a line that names them."""
    start = start_of(cfg)
    if not start.pretrained:
        return "weights: random"
    if start.kind == "run" and start.file is not None:
        return start_from(start.file, model, architecture, classes)
    file = weights.weights_file(cfg.model)
    weights.load_backbone(model, weights.read_tensors(file), architecture, str(file))
    return f"weights: backbone of {file}, new head"
