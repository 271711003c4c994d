"""Exact evaluation: the records of every sample, gathered once, each sample counted once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from resnet_dist.data.loader import EvalLoader
from resnet_dist.data.transforms import Batch
from resnet_dist.evaluation.records import KEEP_NOTHING, TOP_K, Keep, Records


def collect_records(
    accelerator: Accelerator,
    model: nn.Module,
    loader: EvalLoader,
    to_input: Callable[[Batch], torch.Tensor],
    num_classes: int,
    full_precision: bool,
    check: Callable[[], None] = lambda: None,
    temperature: float = 1.0,
    keep: Keep = KEEP_NOTHING,
) -> Records:
    """The records of every sample of the loader's table; every process must call this, and each gets all records.

    `model` is the unwrapped module: a DDP wrapper would wait in its forward for processes that have no batch left.
    With `full_precision`, float32 without TF32; else under the run's mixed precision. `check` is called before each
    batch, equally often on every process, and may raise. Losses and probabilities are those of the logits divided by
    `temperature`; the order of the classes is that of the logits. Raises RuntimeError if a sample is missing or double.
    """
    k = min(TOP_K, num_classes)
    # A process without a batch gathers too, so there is an empty row of the right width to begin with.
    widths = {"whole": 2 + k, "real": 1 + k}
    widths |= {"logits": num_classes} if keep.logits else {}
    widths |= {"features": head_width(model)} if keep.features else {}
    kinds = {"whole": torch.int64}
    rows = {
        name: [torch.empty(0, width, dtype=kinds.get(name, torch.float32), device=accelerator.device)]
        for name, width in widths.items()
    }
    model.eval()
    precision = _float32() if full_precision else accelerator.autocast()
    with torch.inference_mode(), precision, _features_of(model, rows.get("features")):
        batches = iter(loader)
        for _ in range(loader.rounds):
            check()
            batch = next(batches, None)
            if batch is None:  # this process has less than another
                continue
            batch = batch.to(accelerator.device)
            logits = model(to_input(batch)).float()
            classes = logits.topk(k, dim=1).indices
            scaled = logits if temperature == 1 else logits / temperature
            loss = F.cross_entropy(scaled, batch.targets, reduction="none")
            probabilities = scaled.softmax(1).gather(1, classes)
            rows["whole"].append(torch.cat([batch.index[:, None], batch.targets[:, None], classes], dim=1))
            rows["real"].append(torch.cat([loss[:, None], probabilities], dim=1))
            if keep.logits:
                rows["logits"].append(logits)
    gathered = {name: _gather(accelerator, torch.cat(parts), loader.per_process) for name, parts in rows.items()}
    return _in_order(samples=loader.samples, **gathered)


def head_width(model: nn.Module) -> int:
    """The number of input features of a ResNet's head."""
    return next(layer.in_features for layer in model.get_submodule("fc").modules() if isinstance(layer, nn.Linear))


@contextmanager
def _features_of(model: nn.Module, rows: list[torch.Tensor] | None) -> Iterator[None]:
    """Within it, the input of the head in every forward pass is added to `rows`, unless that is None."""
    if rows is None:
        yield
        return
    hook = model.get_submodule("fc").register_forward_pre_hook(lambda _, given: rows.append(given[0].float()))
    try:
        yield
    finally:
        hook.remove()


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


def _in_order(
    whole: np.ndarray,
    real: np.ndarray,
    samples: int,
    logits: np.ndarray | None = None,
    features: np.ndarray | None = None,
) -> Records:
    """Records from gathered rows: padding dropped, in the order of the table, checked complete."""
    there = np.flatnonzero(whole[:, 0] >= 0)
    there = there[np.argsort(whole[there, 0], kind="stable")]
    whole, real = whole[there], real[there]
    if not np.array_equal(whole[:, 0], np.arange(samples)):
        raise RuntimeError(f"evaluation saw {len(whole)} records of {samples} samples: some are missing or double")
    kept = [None if rows is None else rows[there] for rows in (logits, features)]
    return Records(whole[:, 1], real[:, 0], whole[:, 2:], real[:, 1:], *kept)
