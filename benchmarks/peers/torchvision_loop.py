"""torchvision's references/classification loop: PIL transforms, float32, a metric logger that reads every step."""

from collections.abc import Callable

import peer
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


def train(job: peer.Job, tick: Callable[[], None]) -> float:
    """train_one_epoch and evaluate, epoch after epoch."""
    crop = [v2.RandomResizedCrop(job.size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    changed = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(peer.MEAN, peer.STD)])
    transform = changed if job.kind == "full" else peer.eval_transform(job)
    images = ImageFolder(job.data / "train", transform)
    loader = DataLoader(images, batch_size=job.batch_size, shuffle=True, num_workers=4, pin_memory=True)
    model = peer.torchvision_model(job)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=peer.LR[job.kind], momentum=0.9, weight_decay=1e-4
    )
    losses, top1 = [], 0.0
    for _ in range(job.epochs):
        peer.train_mode(model, job)
        for image, target in loader:
            image, target = image.to(peer.DEVICE, non_blocking=True), target.to(peer.DEVICE, non_blocking=True)
            output = model(image)
            loss = criterion(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), (output.argmax(1) == target).float().mean().item()))  # as its MetricLogger
            tick()
        top1 = peer.evaluate(model, job)
    return top1


if __name__ == "__main__":
    peer.run(train, ["torchvision"])
