"""The options for weights that resnet-dist did not write: what such a file does not say of itself."""

from collections.abc import Iterator
from dataclasses import dataclass

from resnet_dist.config.fields import option
from resnet_dist.config.schema import ArchitectureName

IMAGENET, WORDNET = "imagenet", "wordnet"  # the values of --classes that are no file
TORCHVISION = ("IMAGENET1K_V1", "IMAGENET1K_V2")  # the values of --preprocessing that are no file


@dataclass(frozen=True, kw_only=True)
class ForeignConfig:
    """A weights file of torchvision, timm or another trainer."""

    model: ArchitectureName | None = option(None, "--arch")
    """The network of weights that resnet-dist did not write (default: what their publisher says)."""
    classes: str | None = None
    """The names of their classes, in the order of the outputs: a file (one name per line, or a JSON list), imagenet for
    torchvision's names of the 1000 classes, or wordnet for the WordNet ids of these, which needs timm (default: what
    their publisher says)."""
    preprocessing: str | None = None
    """How their images are prepared: IMAGENET1K_V1 (short side 256, crop 224) or IMAGENET1K_V2 (232, 224), as for
    torchvision's resnet50, or a config.json of timm (default: what their publisher says)."""

    def given(self) -> Iterator[str]:
        """The options that are set."""
        for name in ("model", "classes", "preprocessing"):
            if getattr(self, name) is not None:
                yield f"--{name}"
