"""Exact evaluation: one fixed-width record per sample, gathered once, each sample counted once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from resnet_dist.data.loader import EvalLoader
from resnet_dist.data.transforms import ToInput

TOP_K = 5


@dataclass(frozen=True)
class Records:
    """What the model made of every sample, in the order of the table.

    Attributes:
        target: int64 (n,), class indices.
        loss: float32 (n,), cross-entropy in nats, without label smoothing or class weights.
        classes: int64 (n, k), the k = min(5, classes) best, best first.
        probabilities: float32 (n, k), theirs.
    """

    target: np.ndarray
    loss: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.target)

    @property
    def prediction(self) -> np.ndarray:
        """int64 (n,), the best class of each sample."""
        return self.classes[:, 0]


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: EvalLoader,
    to_input: ToInput,
    num_classes: int,
    full_precision: bool,
    check: Callable[[], None] = lambda: None,
) -> Records:
    """The records of every sample of the loader's table; every process must call this, and each gets all records.

    `model` is the unwrapped module: a DDP wrapper would wait in its forward for processes that have no batch left.
    With `full_precision`, float32 without TF32; else under the run's mixed precision. `check` is called before each
    batch, equally often on every process, and may raise. Raises RuntimeError if a sample is missing or double.
    """
    k = min(TOP_K, num_classes)
    # A process without a batch gathers too, so there is an empty row of the right width to begin with.
    whole = [torch.empty(0, 2 + k, dtype=torch.int64, device=accelerator.device)]
    real = [torch.empty(0, 1 + k, dtype=torch.float32, device=accelerator.device)]
    model.eval()
    with torch.inference_mode(), _float32() if full_precision else accelerator.autocast():
        batches = iter(loader)
        for _ in range(loader.rounds):
            check()
            batch = next(batches, None)
            if batch is None:  # this process has less than another
                continue
            batch = batch.to(accelerator.device)
            logits = model(to_input(batch)).float()
            loss = F.cross_entropy(logits, batch.targets, reduction="none")
            probabilities, classes = logits.softmax(1).topk(k, dim=1)
            whole.append(torch.cat([batch.index[:, None], batch.targets[:, None], classes], dim=1))
            real.append(torch.cat([loss[:, None], probabilities], dim=1))
    rows = loader.per_process
    return _in_order(
        _gather(accelerator, torch.cat(whole), rows), _gather(accelerator, torch.cat(real), rows), loader.samples
    )


@contextmanager
def _float32() -> Iterator[None]:
    """Matrix products and convolutions in float32 proper, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _gather(accelerator: Accelerator, rows: torch.Tensor, per_process: int) -> np.ndarray:
    """The rows of all processes, each padded to the same number with rows of -1."""
    padded = F.pad(rows, (0, 0, 0, per_process - len(rows)), value=-1)
    gathered = accelerator.gather(padded) if accelerator.num_processes > 1 else padded
    return np.asarray(gathered.cpu())


def _in_order(whole: np.ndarray, real: np.ndarray, samples: int) -> Records:
    there = whole[:, 0] >= 0
    whole, real = whole[there], real[there]
    order = np.argsort(whole[:, 0], kind="stable")
    whole, real = whole[order], real[order]
    if not np.array_equal(whole[:, 0], np.arange(samples)):
        raise RuntimeError(f"evaluation saw {len(whole)} records of {samples} samples: some are missing or double")
    return Records(whole[:, 1], real[:, 0], whole[:, 2:], real[:, 1:])
