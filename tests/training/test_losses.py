"""Losses against torch's own on one batch, and their parts against the whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from resnet_dist.config.schema import LossConfig
from resnet_dist.data.transforms import Batch
from resnet_dist.errors import DataError
from resnet_dist.training.losses import Loss, class_weights

CLASSES = ("a", "b", "c")


def batch_of(targets: torch.Tensor, shares: torch.Tensor | None = None) -> Batch:
    n = len(targets)
    mix = None if shares is None else torch.cat([shares[:, None], torch.zeros(n, 4)], dim=1)
    zeros = torch.zeros(n, dtype=torch.int64)
    return Batch(torch.zeros(n, 1, 1, 3, dtype=torch.uint8), targets, zeros, zeros, None, mix)


def mean(loss: Loss, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    weights = loss.denominators(batch)
    return loss.numerators(logits, batch).sum() / (len(batch.targets) if weights is None else weights.sum())


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 3


TARGETS = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2])
WEIGHT = torch.tensor([0.5, 2.0, 1.25])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_cross_entropy_equals_torch(logits: torch.Tensor, weight: torch.Tensor | None, smoothing: float) -> None:
    loss = Loss(LossConfig(label_smoothing=smoothing), weight)
    expected = F.cross_entropy(logits, TARGETS, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(mean(loss, logits, batch_of(TARGETS)), expected)


def test_mixed_labels_equal_soft_targets(logits: torch.Tensor) -> None:
    """Two labels in shares are torch's cross-entropy with probabilities as targets."""
    shares = torch.tensor([0.9, 0.9, 0.6, 0.6, 1.0, 1.0, 0.5, 0.5])
    batch = batch_of(TARGETS, shares)
    partner = TARGETS[[1, 0, 3, 2, 5, 4, 7, 6]]
    soft = shares[:, None] * F.one_hot(TARGETS, 3) + (1 - shares[:, None]) * F.one_hot(partner, 3)
    torch.testing.assert_close(mean(Loss(LossConfig(), None), logits, batch), F.cross_entropy(logits, soft))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_by_definition(logits: torch.Tensor, gamma: float) -> None:
    """-(1 - p)^gamma log p, written out; with gamma 0 it is the cross-entropy."""
    p = logits.softmax(1)[torch.arange(8), TARGETS]
    expected = (-((1 - p) ** gamma) * p.log()).mean()
    loss = Loss(LossConfig(loss="focal", focal_gamma=gamma), None)
    torch.testing.assert_close(mean(loss, logits, batch_of(TARGETS)), expected)


def test_weighted_parts_make_the_whole(logits: torch.Tensor) -> None:
    """Numerators and denominators of two uneven halves add up to the mean of the whole; the mean of means does not."""
    loss = Loss(LossConfig(), WEIGHT)
    halves = [(logits[:2], batch_of(TARGETS[:2])), (logits[2:], batch_of(TARGETS[2:]))]
    top = torch.stack([loss.numerators(x, b).sum() for x, b in halves]).sum()
    bottom = torch.stack([loss.denominators(b).sum() for _, b in halves]).sum()  # type: ignore[union-attr]
    whole = F.cross_entropy(logits, TARGETS, weight=WEIGHT)
    torch.testing.assert_close(top / bottom, whole)
    assert abs(torch.stack([mean(loss, x, b) for x, b in halves]).mean() - whole) > 1e-3


def test_balanced_weights_equal_scikit_learn() -> None:
    targets = np.array([0] * 7 + [1] * 2 + [2] * 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    found = class_weights(LossConfig(class_weights="balanced"), CLASSES, targets)
    assert found is not None
    assert found.numpy() == pytest.approx(expected)


def test_weights_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.toml"
    file.write_text("c = 3\na = 0.5\nb = 1.0\n")
    found = class_weights(LossConfig(class_weights=str(file)), CLASSES, np.array([0]))
    assert found is not None
    assert found.tolist() == [0.5, 1.0, 3.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = 1\nb = 1\n", "no weight for 'c'"),
        ("a = 1\nb = 1\nc = 1\nd = 1\n", "'d' is not a class"),
        ("a = 0\nb = 1\nc = 1\n", "weight of 'a'"),
        ("a = true\nb = 1\nc = 1\n", "weight of 'a'"),
        ('a = "x"\nb = 1\nc = 1\n', "weight of 'a'"),
    ],
)
def test_bad_weight_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "weights.toml"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        class_weights(LossConfig(class_weights=str(file)), CLASSES, np.array([0]))
