"""Cached features: the frozen first part of a network runs once, and the rest trains from its stored outputs."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from resnet_dist.config.schema import TrainConfig
from resnet_dist.data.loader import EvalImages, EvalLoader, KnownSamples, TrainImages, TrainLoader
from resnet_dist.data.transforms import Batch
from resnet_dist.errors import DataError
from resnet_dist.model.parts import cut, first_changing_stage
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import on_main
from resnet_dist.runtime.faults import memory_for
from resnet_dist.training.job import Job, eval_loader
from resnet_dist.training.plan import PlannedPhase

Input = Callable[[Batch], torch.Tensor]  # from a batch to the input of the network, or of its trained part
SHARE_OF_MEMORY = 0.5  # of the memory that is free when the phase begins; the rest is for training


class View(Dataset[Batch]):
    """One augmented view of the training images, by position: the random changes of one epoch."""

    def __init__(self, images: TrainImages, epoch: int) -> None:
        self.images, self.table, self.epoch = images, images.table, epoch

    def __getitems__(self, positions: np.ndarray) -> Batch | DataError:
        """The batch, or the error that prevents it."""
        return self.images.__getitems__(np.stack([np.full_like(positions, self.epoch), positions], 1))


@dataclass
class Features:
    """Backbone activations of every sample, concatenated over views.

    `example` is the activation of one sample, (1, F), or (1, H, W, C) before a convolutional stage, in the dtype in
    which the network computes. `values` is filled when the phase begins and has views * samples such rows.
    """

    prefix: nn.Module
    views: Sequence[EvalImages | View]
    example: torch.Tensor
    values: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """The memory of the values."""
        rows = sum(len(view.table) for view in self.views)
        return rows * self.example.numel() * self.example.element_size()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The features of a batch: (B, F), or (B, C, H, W) in channels_last order."""
        assert self.values is not None, "filled when the phase begins"
        found = self.values.index_select(0, batch.index)
        return found.permute(0, 3, 1, 2) if found.ndim == 4 else found

    def fill(self, job: Job) -> None:
        """Compute the values, each process a part, in memory allocated once. Raises StopRequested, DataError."""
        if self.values is not None:
            return
        samples, world = len(self.views[0].table), job.accelerator.num_processes
        rows = -(-samples // world) * world  # padded to equal parts; the next view overwrites the padding
        with memory_for(job.accelerator, "the kept features", "take --cache-features off"):
            values = self.example.new_empty((len(self.views) - 1) * samples + rows, *self.example.shape[1:])
            for number, view in enumerate(self.views):
                self._compute(job, view, values[number * samples :][:rows])
        self.values = values[: len(self.views) * samples]

    @torch.no_grad()
    def _compute(self, job: Job, view: EvalImages | View, whole: torch.Tensor) -> None:
        """Compute the features of one view into `whole`. Every process computes the same number of rows."""
        loader, done = eval_loader(job.accelerator, job.plan.eval_batch_size, view, job.plan.workers), 0
        own = whole if job.accelerator.num_processes == 1 else torch.zeros_like(whole[: loader.per_process])
        self.prefix.eval()
        with job.accelerator.autocast(), job.display.epoch("features", loader.rounds):
            batches = iter(loader)
            for number in range(loader.rounds):
                job.stop.check()
                batch = next(batches, None)
                if batch is not None:
                    count = len(batch.targets)
                    own[done : done + count] = _stored(self.prefix(job.to_input(batch.to(job.accelerator.device))))
                    done += count
                    job.display.advance(number + 1, {}, count)
        if own is not whole:  # as bytes: not every backend gathers every dtype
            torch.distributed.all_gather_into_tensor(whole.view(torch.uint8), own.view(torch.uint8))


def _stored(values: torch.Tensor) -> torch.Tensor:
    return values.permute(0, 2, 3, 1).contiguous() if values.ndim == 4 else values


@dataclass(frozen=True)
class Source:
    """The inputs of a phase in training and validation: images and the whole network, or features and the rest of it.

    The modules share the parameters of the job's model.
    """

    train_module: nn.Module
    train_loader: TrainLoader
    train_input: Input
    val_module: nn.Module
    val_loader: EvalLoader
    val_input: Input

    def fill(self, job: Job) -> None:
        """Compute the features that the phase uses. Raises StopRequested, DataError."""
        for known in (self.train_input, self.val_input):
            if isinstance(known, Features):
                known.fill(job)


def source(job: Job, phase: PlannedPhase) -> Source:
    """Decide whether a phase uses cached features, and print it. Every process must call this.

    Training uses them if the frozen part of the network sees the same image in every epoch: without augmentation, or
    with a fixed number of views (--cache-features N). Validation always does. Neither does if it would save nothing
    (one epoch, no frozen part), or if the features take more than half of the free memory.
    """
    images = Source(job.model, job.train_loader, job.to_input, job.model, job.val_loader, job.to_input)
    stage, asked = first_changing_stage(phase.trainable, phase.updating), job.plan.cfg.system.cache_features
    if asked == "off" or stage == "stem" or phase.epochs == 1:
        return images
    prefix, rest = cut(job.model, stage)
    example = _example(job.accelerator, prefix, job.plan.spec.img_size)
    val = Features(prefix, [EvalImages(job.plan.index.val, job.plan.spec)], example)
    train = _of_training(job.plan.cfg, job.train_images, prefix, example)
    room = on_main(job.accelerator, lambda: _room(job.accelerator.device))
    fits = [features for features in (val, train) if features is not None]
    while fits and sum(features.bytes for features in fits) > room:
        fits.pop()
    names = [name for name, features in (("validation", val), ("training", train)) if features in fits]
    if names:
        size = sum(features.bytes for features in fits) / (1 << 20)
        why = "" if train else " (training images change at random: --aug none, or --cache-features N for N views)"
        job.display.say(f"features before {stage} are computed once, for {' and '.join(names)}, {size:.1f} MiB{why}")
    if train is not None and train in fits:
        known = KnownSamples(job.plan.index.train, job.train_images.seed, len(train.views))
        on_gpu = job.accelerator.device.type == "cuda"
        loader = TrainLoader(known, job.plan.batches, 0, pin_memory=on_gpu)
        images = dataclasses.replace(images, train_module=rest, train_loader=loader, train_input=train)
    if val in fits:
        images = dataclasses.replace(
            images,
            val_module=rest,
            val_loader=eval_loader(job.accelerator, job.plan.eval_batch_size, KnownSamples(job.plan.index.val), 0),
            val_input=val,
        )
    return images


def _of_training(cfg: TrainConfig, images: TrainImages, prefix: nn.Module, example: torch.Tensor) -> Features | None:
    asked, augment = cfg.system.cache_features, cfg.augment
    if augment.mixup or augment.cutmix or (asked == "auto" and augment.aug != "none"):
        return None
    views = 1 if augment.aug == "none" else int(asked)
    return Features(prefix, [View(images, epoch) for epoch in range(views)], example)


@torch.no_grad()
def _example(accelerator: Accelerator, prefix: nn.Module, size: int) -> torch.Tensor:
    prefix.eval()
    with accelerator.autocast():
        values: torch.Tensor = prefix(torch.zeros(1, 3, size, size, device=accelerator.device))
    return _stored(values)


def _room(device: torch.device) -> int:
    """Bytes of memory that features may take in each process."""
    if device.type == "cuda":
        return int(SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0])
    return int(SHARE_OF_MEMORY * launcher.available_memory() / launcher.local_world_size())
