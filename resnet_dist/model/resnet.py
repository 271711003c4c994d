"""Build a torchvision ResNet with one of our heads and stems; the stage of a parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn

from resnet_dist.config.schema import ARCHITECTURES, ModelConfig
from resnet_dist.model.head import ConcatPool, LinearHead, deep_head, mlp


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that is needed to build a network again. Stored in every checkpoint."""

    name: str
    stem: str
    head: str
    head_hidden: tuple[int, ...]
    dropout: float
    num_classes: int

    @classmethod
    def of(cls, cfg: ModelConfig, num_classes: int) -> "Architecture":
        """The architecture of the settings."""
        hidden = () if cfg.head == "linear" else cfg.head_hidden
        return cls(
            name=cfg.model,
            stem=cfg.stem,
            head=cfg.head,
            head_hidden=hidden,
            dropout=cfg.dropout,
            num_classes=num_classes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `architecture`, `stem` and `head`, as a checkpoint stores them."""
        head = {"name": self.head, "hidden": list(self.head_hidden), "dropout": self.dropout}
        return {"architecture": self.name, "stem": self.stem, "head": head}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], num_classes: int) -> "Architecture":
        """From the stored form. Raises ValueError if it cannot be built."""
        head = values.get("head")
        if values.get("architecture") not in ARCHITECTURES or values.get("stem") not in ("standard", "small"):
            raise ValueError(f"unknown architecture {values.get('architecture')!r} or stem {values.get('stem')!r}")
        if not isinstance(head, dict) or head.get("name") not in ("linear", "mlp", "concat-pool"):
            raise ValueError(f"unknown head {head!r}")
        hidden, dropout = head.get("hidden"), head.get("dropout")
        if (
            not isinstance(hidden, list)
            or not all(type(n) is int and 0 < n <= 65536 for n in hidden)
            or len(hidden) > 16
        ):
            raise ValueError(f"the hidden widths of the head must be at most 16 integers in 1..65536, not {hidden!r}")
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in 0..1 (below 1), not {dropout!r}")
        return cls(
            name=values["architecture"],
            stem=values["stem"],
            head=head["name"],
            head_hidden=tuple(hidden),
            dropout=float(dropout),
            num_classes=num_classes,
        )


def build(architecture: Architecture) -> nn.Module:
    """A torchvision ResNet (He et al. 2015; the v1.5 bottleneck), ResNeXt (Xie et al. 2017) or Wide ResNet (Zagoruyko
    and Komodakis 2016) with random weights.

    Input float32 (B, 3, H, W); output logits (B, num_classes). With the linear head and the standard stem, names and
    shapes of all parameters are torchvision's own.
    """
    model: nn.Module = getattr(torchvision.models, architecture.name)(weights=None)
    if architecture.stem == "small":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    features = int(model.fc.in_features)  # type: ignore[union-attr, arg-type]
    classes, hidden, dropout = architecture.num_classes, architecture.head_hidden, architecture.dropout
    if architecture.head == "linear":
        model.fc = LinearHead(features, classes, dropout)
    elif architecture.head == "mlp":
        model.fc = mlp(features, hidden, classes, dropout)
    else:
        model.avgpool = ConcatPool()
        model.fc = deep_head(2 * features, hidden, classes, dropout)
    return model.to(memory_format=torch.channels_last)


def empty(architecture: Architecture) -> nn.Module:
    """The network on the meta device, without memory for its weights: for names, shapes and counting."""
    with torch.device("meta"):
        return build(architecture)


def stage_of(name: str) -> str:
    """The stage that a parameter or module belongs to: stem, layer1..layer4 or head."""
    first = name.split(".")[0]
    return {"conv1": "stem", "bn1": "stem", "fc": "head"}.get(first, first)
