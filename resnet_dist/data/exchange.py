"""Images that the processes of a run send each other: each process keeps and augments a part of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Exchange:
    """Which images a process augments for all processes in one micro-step, and which it gets for its own batch.

    Every process knows these numbers from the order of the epoch, so that no process asks another one.

    Attributes:
        rows: int64 (n,), rows of the images kept here, those for process 0 first.
        order: int64 (B,), the place of each sample of the batch among the images that arrive.
        sent: how many images go to each process; their sum is n.
        received: how many images come from each process; their sum is B.
    """

    rows: torch.Tensor
    order: torch.Tensor
    sent: Sequence[int]
    received: Sequence[int]

    def swap(self, images: torch.Tensor) -> torch.Tensor:
        """Send `images`, (n, ...), and return those of the own batch, (B, ...). Every process must call this."""
        arrived = images.new_empty((sum(self.received), *images.shape[1:]))
        torch.distributed.all_to_all_single(arrived, images, list(self.received), list(self.sent))
        return arrived.index_select(0, self.order)
