"""Exact evaluation: gather the records of all samples, each sample exactly once."""

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
    """Compute the records of all samples of the loader's table. Every process must call this and gets all records.

    `model` must be unwrapped, because the forward of a DDP wrapper waits for processes that have no batch left.
    `full_precision` selects float32 without TF32, otherwise the mixed precision of the run is used. `check` is called
    before each batch, equally often on every process, and may raise. Losses and probabilities are computed from the
    logits divided by `temperature`; classes are sorted by logits. Raises RuntimeError if a sample is missing or
    duplicated.
    """
    k = min(TOP_K, num_classes)
    # A process without a batch gathers too, so each list starts with an empty tensor of the right width.
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
            if batch is None:  # this process has fewer batches than another
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
    """Inside this context, append the input of the head to `rows` in every forward pass, unless `rows` is None."""
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
    """Inside this context, matrix products and convolutions use float32 without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _gather(accelerator: Accelerator, rows: torch.Tensor, per_process: int) -> np.ndarray:
    """Gather the rows of all processes, padded to `per_process` rows each with rows of -1."""
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
    """Records from gathered rows: drop the padding, sort by sample, check that every sample is there once."""
    order = np.flatnonzero(whole[:, 0] >= 0)
    order = order[np.argsort(whole[order, 0], kind="stable")]
    whole, real = whole[order], real[order]
    if not np.array_equal(whole[:, 0], np.arange(samples)):
        raise RuntimeError(f"evaluation saw {len(whole)} records of {samples} samples: some are missing or duplicated")
    extras = [None if rows is None else rows[order] for rows in (logits, features)]
    return Records(whole[:, 1], real[:, 0], whole[:, 2:], real[:, 1:], *extras)
