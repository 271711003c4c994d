"""The predictions for images: one fixed-width record per sample, from which every metric is computed."""

from dataclasses import dataclass

import numpy as np

TOP_K = 5


@dataclass(frozen=True)
class Keep:
    """What an evaluation keeps of every sample besides its record: all logits, the features (the input of the head)."""

    logits: bool = False
    features: bool = False


KEEP_NOTHING = Keep()


@dataclass(frozen=True)
class Records:
    """What the model predicts for every sample, in the order of the table.

    Attributes:
        target: int64 (n,), class indices.
        loss: float32 (n,), cross-entropy in nats, without label smoothing or class weights.
        classes: int64 (n, k), the k = min(5, classes) best, best first.
        probabilities: float32 (n, k), theirs.
        logits: float32 (n, classes), before any temperature, if they were kept.
        features: float32 (n, F), the input of the head, if they were kept.
    """

    target: np.ndarray
    loss: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray | None = None
    features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def prediction(self) -> np.ndarray:
        """int64 (n,), the best class of each sample."""
        return self.classes[:, 0]
