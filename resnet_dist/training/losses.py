"""Losses as a numerator and a denominator per sample, so that the mean over batches and processes is exact."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from resnet_dist.config.schema import LossConfig
from resnet_dist.config.stored import read_toml
from resnet_dist.data.transforms import Batch
from resnet_dist.errors import DataError


class Loss:
    """Cross-entropy or focal loss, with class weights and label smoothing.

    The loss of a set of samples is sum(numerators) / sum(denominators), torch's weighted mean: each sample counts with
    the weight of its class. A mean over the means of batches would differ if the batches have different weights.
    """

    def __init__(self, cfg: LossConfig, weights: torch.Tensor | None) -> None:
        self.focal_gamma = cfg.focal_gamma if cfg.loss == "focal" else None
        self.smoothing = cfg.label_smoothing
        self.weights = weights

    def numerators(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """float32 (B,), differentiable. For mixed samples, the losses of both labels, weighted by their shares."""
        values = self._of(logits.float(), batch.targets)
        if batch.mix is None:
            return values
        share = batch.mix[:, 0]
        return share * values + (1 - share) * self._of(logits.float(), batch.partners)

    def denominators(self, batch: Batch) -> torch.Tensor | None:
        """float32 (B,), the class weights of the samples; None if there are no class weights."""
        if self.weights is None:
            return None
        if batch.mix is None:
            return self.weights[batch.targets]
        share = batch.mix[:, 0]
        return share * self.weights[batch.targets] + (1 - share) * self.weights[batch.partners]

    def _of(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.focal_gamma is None:
            return F.cross_entropy(
                logits, targets, weight=self.weights, reduction="none", label_smoothing=self.smoothing
            )
        # Lin et al. 2017, equation 5: (1 - p)^gamma * -log p, alpha being the class weight.
        plain = F.cross_entropy(logits, targets, reduction="none")
        value = (1 - torch.exp(-plain)) ** self.focal_gamma * plain
        return value if self.weights is None else self.weights[targets] * value


def class_weights(cfg: LossConfig, classes: Sequence[str], targets: np.ndarray) -> torch.Tensor | None:
    """float32 (classes,), or None for --class-weights none.

    `balanced` is n / (classes * count), as in scikit-learn; otherwise the weights are read from a TOML file. Raises
    DataError if the file does not give a positive number for every class.
    """
    if cfg.class_weights == "none":
        return None
    if cfg.class_weights == "balanced":
        counts = np.bincount(targets, minlength=len(classes))
        return torch.tensor(len(targets) / (len(classes) * np.maximum(counts, 1)), dtype=torch.float32)
    given: dict[str, Any] = read_toml(cfg.class_weights)
    missing = [name for name in classes if name not in given]
    unknown = [name for name in given if name not in classes]
    if missing or unknown:
        which = f"no weight for '{missing[0]}'" if missing else f"'{unknown[0]}' is not a class"
        raise DataError(f'{cfg.class_weights}: {which}; it needs one line per class, such as "cat" = 1.5')
    bad = [
        n for n in classes if isinstance(given[n], bool) or not isinstance(given[n], int | float) or not given[n] > 0
    ]
    if bad:
        raise DataError(f"{cfg.class_weights}: the weight of '{bad[0]}' must be a number above 0")
    return torch.tensor([float(given[name]) for name in classes], dtype=torch.float32)
