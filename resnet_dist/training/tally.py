"""What training sums up on the device between two polls."""

from dataclasses import dataclass

import torch


class Tally:
    """Sums of this process over the steps since the last poll, on the device.

    Attributes:
        values: float32 (5,), all of them; the other attributes are float32 () views of it, to be changed in place.
        loss: of the weighted losses.
        weight: of the weights of the samples.
        correct: of the correct predictions.
        images: of the samples.
        nonfinite: 1 once a gradient was not finite, otherwise 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(5, device=device)
        self.loss, self.weight, self.correct, self.images, self.nonfinite = (self.values[row] for row in range(5))


@dataclass(frozen=True)
class Sums:
    """A tally that the host has read, summed over all processes."""

    loss: float
    weight: float
    correct: float
    images: float
    nonfinite: float

    @property
    def mean_loss(self) -> float:
        """The mean loss of the samples, by their weights."""
        return self.loss / self.weight

    @property
    def top1(self) -> float:
        """The share of correct predictions, 0..1."""
        return self.correct / self.images
