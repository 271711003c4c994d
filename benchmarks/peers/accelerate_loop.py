"""A loop as in accelerate's examples/cv_example.py: its dataset, Adam over all parameters, one cycle, 4 workers.

Changed: resnet18 instead of resnet50d, the folder's own split, a horizontal flip beside the crop (the job of all), and
in the full job nothing is frozen. Start it with a plain `accelerate launch`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm import create_model
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import CenterCrop, Compose, RandomHorizontalFlip, RandomResizedCrop, Resize, ToTensor


class Images(Dataset[dict[str, Any]]):
    """Files and the class that their folder names."""

    def __init__(self, folder: Path, transform: Compose) -> None:
        self.classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        image = self.transform(PIL.Image.open(file).convert("RGB"))
        return {"image": image, "label": self.classes.index(file.parent.name)}


def train(job: peer.Job, tick: Callable[[], None]) -> float:
    """training_function of the example."""
    accelerator = Accelerator()
    set_seed(job.seed)
    whole = Compose([Resize(256), CenterCrop(job.size), ToTensor()])
    changed = Compose([RandomResizedCrop(job.size), RandomHorizontalFlip(), ToTensor()])
    train_images = Images(job.data / "train", changed if job.kind == "full" else whole)
    train_loader = DataLoader(train_images, shuffle=True, batch_size=job.batch_size, num_workers=4)
    eval_loader = DataLoader(Images(job.data / "val", whole), batch_size=job.batch_size, num_workers=4)
    model = peer.with_weights(create_model("resnet18", num_classes=job.classes), job).to(accelerator.device)
    mean, std = (torch.tensor(values)[None, :, None, None].to(accelerator.device) for values in (peer.MEAN, peer.STD))
    lr = {"full": 1e-3, "head": 3e-2}[job.kind]  # the example's own for a head; Adam's usual for everything
    optimizer = torch.optim.Adam(params=model.parameters(), lr=lr / 25)
    schedule = OneCycleLR(optimizer=optimizer, max_lr=lr, epochs=job.epochs, steps_per_epoch=len(train_loader))
    model, optimizer, train_loader, eval_loader, schedule = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, schedule
    )
    top1 = 0.0
    for _ in range(job.epochs):
        model.train()
        for batch in train_loader:
            inputs = (batch["image"] - mean) / std
            loss = torch.nn.functional.cross_entropy(model(inputs), batch["label"])
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tick()
        model.eval()
        hits: list[bool] = []
        for batch in eval_loader:
            with torch.no_grad():
                predictions = model((batch["image"] - mean) / std).argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["label"]))
            hits += (predictions == references).tolist()
        top1 = sum(hits) / len(hits)
    return top1


if __name__ == "__main__":
    peer.run(train, ["accelerate", "timm"])
