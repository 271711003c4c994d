"""The loop against a loop written out by hand in plain torch, on the same batches."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torchvision import transforms

from resnet_dist.data.loader import epoch_order
from resnet_dist.training.job import Job
from resnet_dist.training.loop import train
from tests.conftest import TINY, write_image
from tests.training.helpers import job_of

GLOBAL_BATCH, STEPS = 8, 3  # 24 images: one epoch
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training images of two unequal classes, already of the network's size."""
    root = tmp_path_factory.mktemp("small")
    for number in range(24):
        name = "a" if number < 16 else "b"
        write_image(root / "train" / name / f"{number}.png", seed=number, tint=number % 3, size=(16, 16))
    for name in "ab":
        write_image(root / "val" / name / "0.png", seed=99, size=(16, 16))
    return root


def by_hand(
    job: Job, make: Optimizer, accumulate: int, weight: torch.Tensor | None, smoothing: float, clip: float | None
) -> dict[str, torch.Tensor]:
    """Three optimizer steps as one would write them in a notebook; the state dict afterwards."""
    model = copy.deepcopy(job.model).train()
    optimizer = make(model)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    table = job.plan.index.train
    order = epoch_order(len(table), job.plan.cfg.run.seed, 0, GLOBAL_BATCH, drop_last=False)
    for of_step in order.reshape(STEPS, GLOBAL_BATCH):
        total = len(of_step) if weight is None else float(weight[table.targets[of_step]].sum())
        for chosen in of_step.reshape(accumulate, -1):
            x = torch.stack([to_tensor(Image.open(table.root / table.paths[int(i)])) for i in chosen])
            y = torch.tensor(table.targets[chosen])
            loss = F.cross_entropy(model(x), y, weight=weight, label_smoothing=smoothing, reduction="sum")
            (loss / total).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def stages(model: nn.Module, rates: dict[str, float]) -> list[dict[str, object]]:
    """Parameter groups by the first part of the name, as the rates name them."""
    groups: dict[str, list[nn.Parameter]] = {stage: [] for stage in rates}
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        stage = {"conv1": "stem", "bn1": "stem", "fc": "head"}.get(first, first)
        groups[stage if stage in rates else "rest"].append(parameter)
    return [{"params": groups[stage], "lr": rate} for stage, rate in rates.items()]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


# Adam fused, as the loop has it: the default form rounds in another order, and Adam makes much of rounding.
def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)


def nesterov_with_decay(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01, fused=True)


def grouped_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(stages(model, {"stem": 1e-4, "layer4": 1e-2, "head": 0.1, "rest": 0.03}), momentum=0.9)


def grouped_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(stages(model, {"head": 1e-3, "rest": 1e-5}), fused=True)


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=1e-3)


def adagrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=1e-2, fused=True)


CASES = {
    "sgd": ("--opt sgd --lr 0.05 --weight-decay 0", sgd),
    "nesterov-decay": ("--opt sgd --nesterov --lr 0.05 --weight-decay 0.1", nesterov_with_decay),
    "adam": ("--opt adam --lr 1e-3", adam),
    "adamw": ("--opt adamw --lr 1e-3", adamw),
    "rmsprop": ("--opt rmsprop --lr 1e-3", rmsprop),
    "adagrad": ("--opt adagrad --lr 1e-2", adagrad),
    "discriminative-sgd": ("--opt sgd --lr 0.03 --wd 0 --lr-groups stem=1e-4,layer4=1e-2,head=0.1", grouped_sgd),
    "discriminative-adam": ("--opt adam --lr 1e-3 --lr-backbone 1e-5", grouped_adam),
    "accumulation": ("--opt sgd --lr 0.05 --wd 0 --grad-accum 2", sgd),
    "accumulation-adam-weights": ("--opt adam --lr 1e-3 --grad-accum 2 --class-weights balanced", adam),
    "smoothing-weights-clip": (
        "--opt sgd --lr 0.05 --wd 0 --class-weights balanced --label-smoothing 0.1 --clip-grad 0.5",
        sgd,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_plain_torch(case: str, images: Path, tmp_path: Path) -> None:
    """Parameters after three optimizer steps agree to float32 rounding."""
    text, make = CASES[case]
    options = text.split()
    accumulate = 2 if "--grad-accum" in options else 1
    plain = [
        "--resize",
        "16",
        "--aug",
        "none",
        "--sched",
        "constant",
        "--epochs",
        "1",
        "-b",
        str(GLOBAL_BATCH // accumulate),
    ]
    job = job_of(tmp_path / "run", images, *TINY, *plain, *options)
    weight = None
    if "--class-weights" in options:
        targets = job.plan.index.train.targets
        balanced = compute_class_weight("balanced", classes=np.array([0, 1]), y=targets)
        weight = torch.tensor(balanced, dtype=torch.float32)
    clip = 0.5 if "--clip-grad" in options else None
    smoothing = 0.1 if "--label-smoothing" in options else 0.0
    before = copy.deepcopy(job.model.state_dict())
    expected = by_hand(job, make, accumulate, weight, smoothing, clip)
    train(job)
    for name, value in job.model.state_dict().items():
        moved = (expected[name] - before[name]).abs().max().item()
        assert moved > 0, f"{name} did not learn, so comparing it shows nothing"
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-3 * moved, msg=name)
