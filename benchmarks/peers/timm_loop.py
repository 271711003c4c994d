"""timm's train.py: its dataset, loader, model and optimizer; as documented, or tuned with bf16 and channels_last."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

import peer
import torch
from timm import create_model
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter

TUNED = "--tuned" in sys.argv  # train.py --amp --amp-dtype bfloat16 --channels-last
WORKERS = min(16, os.cpu_count() or 1)  # tuned; 4 is its default
LOG_INTERVAL = 50


def train(job: peer.Job, tick: Callable[[], None]) -> float:
    """train_one_epoch and validate, epoch after epoch."""
    loader = create_loader(
        create_dataset("", root=str(job.data), split="train"),
        input_size=(3, job.size, job.size),
        batch_size=job.batch_size,
        is_training=True,
        no_aug=job.kind == "head",
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=WORKERS if TUNED else 4,
        pin_memory=TUNED,
        device=peer.DEVICE,
    )
    model = peer.with_weights(create_model("resnet18", num_classes=job.classes), job)
    if TUNED:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=peer.LR[job.kind], weight_decay=1e-4, momentum=0.9)
    loss_fn, losses, top1 = torch.nn.CrossEntropyLoss(), AverageMeter(), 0.0
    for _ in range(job.epochs):
        peer.train_mode(model, job)
        for index, (inputs, target) in enumerate(loader):
            if TUNED:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast(peer.DEVICE.type, torch.bfloat16) if TUNED else nullcontext():
                loss = loss_fn(model(inputs), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if index % LOG_INTERVAL == 0:
                losses.update(loss.item(), len(inputs))
            tick()
        top1 = peer.evaluate(model, job)
    return top1


if __name__ == "__main__":
    peer.run(train, ["timm"])
