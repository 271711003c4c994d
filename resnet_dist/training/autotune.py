"""A short trial on this machine before training: which precision, and how many loader processes."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from resnet_dist.data.loader import TrainImages
from resnet_dist.errors import DataError
from resnet_dist.model.resnet import build
from resnet_dist.model.trainable import set_trainable, train_mode
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import on_main
from resnet_dist.runtime.wording import precision_name
from resnet_dist.training.plan import Plan

SECONDS = 2.0  # per trial; at most ten in all, with their start-up
LARGEST_BATCH_ON_CPU = 8
HEADROOM = 1.2  # loading should be faster than computing by this factor


def autotune(accelerator: Accelerator, plan: Plan) -> tuple[Plan, list[str]]:
    """The plan with --mixed-precision and --workers decided by a trial, and a line with the measurements for each.

    What the user typed stays. Every process must call this: all measure at the same time, as in training, and the main
    process decides.
    """
    cfg = plan.cfg
    lines: list[str] = []
    precisions = _precisions(accelerator.device)
    open_precision = cfg.system.mixed_precision == "auto" and len(precisions) > 1
    open_workers = cfg.data.workers is None and accelerator.device.type != "cpu"
    if not (open_precision or open_workers):
        return plan, lines
    speeds = _speeds(accelerator, plan, precisions)
    best = on_main(accelerator, lambda: max(speeds, key=lambda name: speeds[name]))
    if open_precision:
        cfg = dataclasses.replace(cfg, system=dataclasses.replace(cfg.system, mixed_precision=cast(Any, best)))
        named = [f"{precision_name(name)} {speed:.1f}" for name, speed in speeds.items()]
        measured = on_main(accelerator, lambda: ", ".join(named))
        lines.append(f"autotune: precision {precision_name(best)} (images/s and process: {measured})")
    if open_workers:
        loading = _rate(_loading(plan), plan.share.batch_size)
        workers, why = on_main(accelerator, lambda: workers_for(speeds[best], loading))
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=workers))
        plan = dataclasses.replace(plan, workers=workers)
        lines.append(f"autotune: {workers} loader processes ({why})")
    return dataclasses.replace(plan, cfg=cfg), lines


def workers_for(computing: float, loading: float) -> tuple[int, str]:
    """The number of loader processes that keep up with computing, at most the available cores, and the reason.
    `computing` and `loading` (of one core) are in images/s.
    """
    share = max(1, launcher.cores() // launcher.local_world_size())
    needed = max(1, math.ceil(HEADROOM * computing / loading))
    why = f"computing takes {computing:.0f} images/s, one core loads {loading:.0f}"
    return min(needed, share), why + (f"; {needed} would be needed, {share} cores are there" if needed > share else "")


def _precisions(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["bf16", "fp16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16", "no"]
    return ["no", "bf16"] if device.type == "cpu" and launcher.cpu_has_bf16() else ["no"]


def _speeds(accelerator: Accelerator, plan: Plan, precisions: list[str]) -> dict[str, float]:
    """Images per second and process of a step of the last phase, by precision, on random pixels."""
    device, size = accelerator.device, plan.spec.img_size
    batch = plan.share.batch_size
    batch = min(batch, LARGEST_BATCH_ON_CPU) if device.type == "cpu" else batch
    with torch.random.fork_rng(devices=[]):  # nothing is drawn on a GPU
        model = build(plan.architecture).to(device)
        images = torch.rand(batch, size, size, 3).to(device).permute(0, 3, 1, 2)
    set_trainable(model, plan.phases[-1].trainable)
    train_mode(model, plan.phases[-1].updating)
    return {name: _rate(lambda name=name: _step(model, images, name), batch) for name in precisions}  # type: ignore[misc]


def _step(model: nn.Module, images: torch.Tensor, precision: str) -> None:
    """A step that changes no parameter. With fp16 it includes unscaling and the check that gradients are finite."""
    device = images.device.type
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast(device, dtype, enabled=precision != "no"):
        loss = F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64, device=images.device))
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()


def _loading(plan: Plan) -> Callable[[], None]:
    cfg, table = plan.cfg, plan.index.train
    images = TrainImages(table, plan.spec, cfg.augment, cfg.run.seed, plan.train_transform)
    keys = [(0, number % len(table)) for number in range(plan.share.batch_size)]

    def load() -> None:
        batch = images.__getitems__(keys)
        if isinstance(batch, DataError):
            raise batch

    return load


def _rate(action: Callable[[], None], images: int) -> float:
    """Images per second of an action that handles `images` images. The first call is not timed; at least one is."""
    action()
    started, calls = time.monotonic(), 0
    while calls == 0 or (time.monotonic() - started < SECONDS and calls < 20):
        action()
        calls += 1
    return images * calls / (time.monotonic() - started)
