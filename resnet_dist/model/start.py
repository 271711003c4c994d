"""The initial weights of a run: random, ImageNet, a file or another run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resnet_dist.files.header import best_of
from resnet_dist.files.weights_file import located
from resnet_dist.model.weights import NAMES


@dataclass(frozen=True)
class StartingPoint:
    """Random weights, torchvision's ImageNet weights, a weights file, or the best weights of another run.

    `source` is "none", the name of torchvision's weights, the path of the file (or its folder or repository, see
    `located`), or the path of the run (its folder or a checkpoint).
    """

    kind: Literal["random", "imagenet", "file", "run"]
    source: str

    @classmethod
    def of(cls, weights: str, init_from: str | None) -> "StartingPoint":
        """From the settings `--weights` and `--init-from`."""
        if init_from is not None:
            return cls("run", init_from)
        if weights == "none":
            return cls("random", weights)
        return cls("imagenet" if weights in NAMES else "file", weights)

    @property
    def pretrained(self) -> bool:
        """Whether the weights have been trained."""
        return self.kind != "random"

    @property
    def file(self) -> Path | None:
        """The user's file with the weights; None for random and for torchvision's weights. Raises as `located`."""
        if self.kind == "run":
            return best_of(self.source)
        return located(self.source) if self.kind == "file" else None

    def __str__(self) -> str:
        """A text for messages."""
        words = {"random": "random weights", "imagenet": f"torchvision's {self.source}", "file": self.source}
        return words.get(self.kind, f"the run {self.source}")
