"""Time the steps and epochs of the program's own training loop: computing alone, and whole epochs."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from resnet_dist.bench.machine import activation_bytes, gemm_flops
from resnet_dist.bench.timing import Repeats, measure, summary, wait_for
from resnet_dist.bench.work import bytes_moved, flops, least_seconds, operations
from resnet_dist.config.schema import Phase, TrainConfig
from resnet_dist.data.loader import TrainBatches, TrainLoader, default_workers
from resnet_dist.data.transforms import Batch
from resnet_dist.files.run import RunFolder
from resnet_dist.model.parts import cut, first_changing_stage
from resnet_dist.model.resnet import empty
from resnet_dist.model.trainable import set_trainable, train_mode
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.display import Display
from resnet_dist.runtime.machine import forget_peak_memory, peak_memory
from resnet_dist.runtime.signals import StopRequests
from resnet_dist.training.compile import compiled
from resnet_dist.training.job import Job, build_job
from resnet_dist.training.loop import Learner, begin_phase, end_phase, train_one_epoch, train_step
from resnet_dist.training.plan import Plan, make_plan, plan_phase
from resnet_dist.training.state import State

LEAST_STEPS, STEPS_PER_WORKER = 6, 4  # in an epoch; a loader process makes whole batches
REGIMES = {  # what is trained; frozen stages also have frozen BatchNorm statistics
    "full": Phase(trainable="all"),
    "layer4+head": Phase(trainable="layer4 head"),
    "head": Phase(trainable="head"),
}


def shortened(accelerator: Accelerator, cfg: TrainConfig, steps: int) -> Plan:
    """The plan with the training images of `steps` steps, spread evenly over the data, or all if there are fewer.

    Raises UsageError, DataError.
    """
    plan = make_plan(accelerator, cfg)
    share = plan.share
    train = plan.index.train.take(plan.index.train.spread(steps * share.global_batch))
    batches = TrainBatches(len(train), plan.batches.seed, share, cfg.data.drop_last)
    return dataclasses.replace(plan, index=dataclasses.replace(plan.index, train=train), batches=batches)


def enough_steps(accelerator: Accelerator, cfg: TrainConfig) -> int:
    """Steps of an epoch that measures loading: several batches of every loader process."""
    workers = cfg.data.workers
    if workers is None:
        workers = default_workers(accelerator.device, launcher.local_world_size())
    return max(LEAST_STEPS, STEPS_PER_WORKER * workers)


def job_of(accelerator: Accelerator, plan: Plan) -> Job:
    """A job that prints nothing and writes nothing."""
    run = RunFolder(Path("bench"), active=False)
    return build_job(accelerator, plan, run, Display(enabled=False), StopRequests())


def begin(job: Job, name: str, epochs: int) -> tuple[Job, Learner]:
    """The job and the learner of one of REGIMES for `epochs` epochs. Features to cache are already computed."""
    plan = job.plan
    phase = plan_phase(REGIMES[name], epochs, job.model, plan.cfg.optim, plan.optimizer)
    job = dataclasses.replace(job, plan=dataclasses.replace(plan, phases=(phase,)))
    learner = begin_phase(job, phase)
    learner.source.fill(job)
    train_mode(job.model, phase.updating)
    return job, learner


def measure_regime(job: Job, name: str, repeats: Repeats, epochs: int, roofs: dict[str, Any]) -> dict[str, Any]:
    """Measure training in one of REGIMES: whole epochs, the work of a step, and the time of a step alone.

    Do not use the job again: its caches are full and its weights have changed.
    """
    forget_peak_memory()
    start = time.perf_counter()
    job, learner = begin(job, name, epochs)
    found: dict[str, Any] = {
        "seconds_to_begin": time.perf_counter() - start,
        "features_are_kept": learner.source.train_module is not job.model,
        "training": whole_training(job, learner, epochs),
        "peak_memory": peak_memory(),
    }
    batches = [batch.to(job.accelerator.device) for batch in next(learner.source.train_loader.epoch(0))]
    found["work"] = work(job, learner, batches[0], roofs)
    found["compute"] = compute(job, learner, batches, repeats)
    found["limits"] = limits(job.accelerator, found, roofs)
    end_phase(job, learner)
    return found


def compute(job: Job, learner: Learner, batches: Sequence[Batch], repeats: Repeats) -> dict[str, Any]:
    """Times of a forward, of forward and backward, and of a step, on batches that are already on the device."""
    accelerator, first = job.accelerator, batches[0]

    def forward() -> torch.Tensor:
        logits = learner.logits(first)  # compiled if steps are
        return job.loss.numerators(logits, first).sum()

    def backward() -> None:
        accelerator.backward(forward() / len(first.targets))
        learner.optimizer.zero_grad()

    def step() -> None:
        train_step(job, learner, batches)

    learning = [parameter for parameter in learner.net.parameters() if parameter.requires_grad]
    found: dict[str, Any] = {
        "gradient_bytes": sum(parameter.numel() * parameter.element_size() for parameter in learning),
        "forward": measure(accelerator, forward, repeats).of_images(len(first.targets)),
        "forward_backward": measure(accelerator, backward, repeats).of_images(len(first.targets)),
        "step": measure(accelerator, step, repeats).of_images(sum(len(batch.targets) for batch in batches)),
    }
    if accelerator.num_processes > 1:
        found["communication"] = communication(job, learner, batches, repeats)
    return found


def communication(job: Job, learner: Learner, batches: Sequence[Batch], repeats: Repeats) -> dict[str, Any]:
    """Times of a step without all-reduce, and of an all-reduce of as many values as the gradient has."""
    alone = without_reduction(job, learner)
    images = sum(len(batch.targets) for batch in batches)
    step = measure(job.accelerator, lambda: train_step(job, alone, batches), repeats)
    parameters = [p.detach() for p in learner.net.parameters() if p.requires_grad]
    for values in parameters:  # steps without all-reduce made them different between processes
        torch.distributed.broadcast(values, 0)
    gradient = torch.zeros(sum(values.numel() for values in parameters), device=job.accelerator.device)
    reduce = measure(job.accelerator, lambda: torch.distributed.all_reduce(gradient), repeats)
    size = gradient.numel() * gradient.element_size()
    return {"step_alone": step.of_images(images), "all_reduce_bytes": reduce.rates(size)}


def without_reduction(job: Job, learner: Learner) -> Learner:
    """The learner without DDP, whose steps do not reduce gradients."""
    module = learner.source.train_module
    return dataclasses.replace(
        learner, net=module, forward=compiled(module) if job.plan.cfg.system.compile == "on" else module
    )


def work(job: Job, learner: Learner, batch: Batch, roofs: dict[str, Any]) -> dict[str, float]:
    """FLOPs and bytes of a step per image, and the images per second that the measured roofs allow."""
    shape = learner.source.train_input(batch).shape
    done = operations(_on_meta(job, learner), shape)
    width = activation_bytes(job.accelerator)
    seconds = least_seconds(done, gemm_flops(job.accelerator, roofs), roofs["copy_bytes"]["median"], width)
    return {
        "flops_per_image": flops(done) / shape[0],
        "bytes_per_image": bytes_moved(done, width) / shape[0],
        "roofline_images_per_second": shape[0] / seconds,
    }


def _on_meta(job: Job, learner: Learner) -> nn.Module:
    """The part of the network that training runs, in training mode, on the meta device."""
    model = empty(job.plan.architecture)
    set_trainable(model, learner.phase.trainable)
    train_mode(model, learner.phase.updating)
    if learner.source.train_module is job.model:
        return model
    return cut(model, first_changing_stage(learner.phase.trainable, learner.phase.updating))[1]


def limits(accelerator: Accelerator, found: dict[str, Any], roofs: dict[str, Any]) -> dict[str, float]:
    """The speed of a step as shares of the measured roofs."""
    rate, of_step = found["compute"]["step"]["images_per_second"], found["work"]
    return {
        "share_of_gemm": rate * of_step["flops_per_image"] / gemm_flops(accelerator, roofs),
        "share_of_copy": rate * of_step["bytes_per_image"] / roofs["copy_bytes"]["median"],
        "share_of_roofline": rate / of_step["roofline_images_per_second"],
    }


class WatchedLoader(TrainLoader):
    """A training loader that measures how long the loop waits for it."""

    def __init__(self, loader: TrainLoader) -> None:
        vars(self).update(vars(loader))
        self.waited = 0.0

    def epoch(self, epoch: int, first_step: int = 0, until: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step, as the loader gives them."""
        arriving = super().epoch(epoch, first_step, until)
        while True:
            start = time.perf_counter()
            batches = next(arriving, None)
            self.waited += time.perf_counter() - start
            if batches is None:
                return
            yield batches


def whole_training(job: Job, learner: Learner, epochs: int) -> dict[str, Any]:
    """Time whole epochs of the loop: the first, and the median of the later ones."""
    watched = WatchedLoader(learner.source.train_loader)
    learner.source = dataclasses.replace(learner.source, train_loader=watched)
    images = watched.steps_per_epoch * watched.batches.share.global_batch
    seconds, waits = [], []
    for number in range(epochs):
        watched.waited = 0.0
        start = time.perf_counter()
        train_one_epoch(job, learner, State(epochs_done=number))
        wait_for(job.accelerator.device)
        seconds.append(time.perf_counter() - start)
        waits.append(watched.waited / seconds[-1])
    later = seconds[1:] or seconds
    return {
        "first_epoch": summary(seconds[:1], 1).of_images(images),
        "later_epochs": summary(later, 1).of_images(images),
        "steps_per_epoch": watched.steps_per_epoch,
        "data_wait_share": float(np.median(waits[1:] or waits)),
    }
