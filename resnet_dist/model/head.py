"""The heads: linear, MLP, or the deeper head with concatenated pooling."""

import torch
import torch.nn.functional as F
from torch import nn

_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's, as signed 64-bit numbers


def _mix_bits(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64: products wrap around, and masks turn >> into a logical shift."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MULTIPLIERS[1]
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def dropout_mask(keys: torch.Tensor, features: int, p: float, layer: int) -> torch.Tensor:
    """The dropout mask, bool (B, features): True, with probability 1 - p, for a feature that is not dropped.

    It is a hash of the sample's key, the layer and the feature. So it is the same on every device and in every batch,
    and there is no generator whose state would have to be saved for resuming.
    """
    column = torch.arange(features, device=keys.device, dtype=torch.int64) + (layer << 32)
    bits = _mix_bits(_mix_bits(keys)[:, None] + _mix_bits(column)[None, :])
    uniform = (bits >> 40) & ((1 << 24) - 1)
    return uniform >= round(p * (1 << 24))


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask depends on the samples and not on a random state.

    The training loop sets `keys`, int64 (B,), before each forward. Without keys this is torch's own dropout.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer
        self.keys: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F) to (B, F), scaled by 1 / (1 - p) in training."""
        if not self.training or self.p == 0:
            return x
        if self.keys is None:
            return F.dropout(x, self.p)
        keep = dropout_mask(self.keys, x.shape[1], self.p, self.layer)
        return x * keep.to(x.dtype) / (1 - self.p)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"p={self.p}"


class LinearHead(nn.Linear):
    """A linear layer with dropout before it; its parameters have torchvision's names (fc.weight, fc.bias)."""

    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__(features, classes)
        self.dropout = Dropout(dropout, layer=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, features) to logits (B, classes)."""
        return super().forward(self.dropout(x))


class ConcatPool(nn.Module):
    """Average and maximum over the positions, one after the other (fastai's AdaptiveConcatPool2d, average first)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, F, H, W) to (B, 2F, 1, 1)."""
        # torch 2.11 cannot export adaptive_max_pool2d; over the whole map max_pool2d is the same.
        return torch.cat([F.adaptive_avg_pool2d(x, 1), F.max_pool2d(x, x.shape[2:])], dim=1)


def mlp(features: int, hidden: tuple[int, ...], classes: int, dropout: float) -> nn.Sequential:
    """Linear-ReLU-Dropout for every hidden width, then Linear to the classes."""
    layers: list[nn.Module] = []
    for number, width in enumerate(hidden):
        layers += [nn.Linear(features, width), nn.ReLU(inplace=True), Dropout(dropout, number)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def deep_head(features: int, hidden: tuple[int, ...], classes: int, dropout: float) -> nn.Sequential:
    """Linear-BatchNorm-ReLU-Dropout for every hidden width, then Linear to the classes."""
    layers: list[nn.Module] = []
    for number, width in enumerate(hidden):
        layers += [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), Dropout(dropout, number)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def set_sample_keys(model: nn.Module, keys: torch.Tensor) -> None:
    """Set the sample keys, int64 (B,), of the next forward in every Dropout."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.keys = keys
