"""Where the weights of a run start from, as one value that everything which depends on it asks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resnet_dist.files.header import best_of
from resnet_dist.model.weights import NAMES


@dataclass(frozen=True)
class StartingPoint:
    """Random weights, torchvision's ImageNet weights, a weights file, or the best weights of another run.

    `source` is "none", the name of torchvision's weights, the path of the file, or the path of the run (its folder or
    a checkpoint).
    """

    kind: Literal["random", "imagenet", "file", "run"]
    source: str

    @classmethod
    def of(cls, weights: str, init_from: str | None) -> "StartingPoint":
        """What the settings `--weights` and `--init-from` mean together."""
        if init_from is not None:
            return cls("run", init_from)
        if weights == "none":
            return cls("random", weights)
        return cls("imagenet" if weights in NAMES else "file", weights)

    @property
    def pretrained(self) -> bool:
        """Whether training fine-tunes weights that have learnt something."""
        return self.kind != "random"

    @property
    def file(self) -> Path | None:
        """The file of the user's that holds the weights; None for random and for torchvision's."""
        if self.kind == "run":
            return best_of(self.source)
        return Path(self.source) if self.kind == "file" else None

    def __str__(self) -> str:
        """In words."""
        words = {"random": "random weights", "imagenet": f"torchvision's {self.source}", "file": self.source}
        return words.get(self.kind, f"the run {self.source}")
