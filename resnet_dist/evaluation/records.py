"""Predictions: one record of fixed width per sample. Every metric is computed from the records."""

from dataclasses import dataclass

import numpy as np

TOP_K = 5


@dataclass(frozen=True)
class Keep:
    """What an evaluation keeps in addition to the record of a sample: logits, features (the input of the head)."""

    logits: bool = False
    features: bool = False


KEEP_NOTHING = Keep()


@dataclass(frozen=True)
class Records:
    """The predictions for all samples, in the order of the table.

    Attributes:
        target: int64 (n,), class indices.
        loss: float32 (n,), cross-entropy in nats, without label smoothing or class weights.
        classes: int64 (n, k), the k = min(5, classes) most probable classes, best first.
        probabilities: float32 (n, k), their probabilities.
        logits: float32 (n, classes), not divided by a temperature; None if they were not kept.
        features: float32 (n, F), the input of the head; None if they were not kept.
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
