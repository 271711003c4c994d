"""Counting the batches of all BatchNorm layers at once, against torch's own counting."""

import copy

import pytest
import torch

from resnet_dist.config.schema import Phase
from resnet_dist.model.batch_norm import counted_together, counting_batch_norms
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.model.trainable import train_mode, updating_batch_norms

NETWORK = Architecture(name="resnet18", stem="small", head="mlp", head_hidden=(8,), dropout=0.0, num_classes=3)


@pytest.mark.parametrize("trainable", ["all", "layer4 head", "all -batchnorm"])
def test_counters_and_statistics_are_torchs(trainable: str) -> None:
    model = build(NETWORK)
    phase = Phase(trainable=trainable, epochs=1, batch_norm_stats="frozen" if "-" in trainable else None)
    train_mode(model, updating_batch_norms(model, phase))
    plain, layers = copy.deepcopy(model), counting_batch_norms(model)
    for seed in range(3):
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with counted_together(layers):
            model(images)
        plain(images)
    found, expected = model.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_counters_are_back_after_an_error() -> None:
    model = build(NETWORK).train()
    with pytest.raises(RuntimeError), counted_together(counting_batch_norms(model)):
        model(torch.zeros(1, 5, 16, 16))
    assert {int(t) for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")} == {0}


def test_sync_batch_norm_counts_for_itself() -> None:
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(build(NETWORK))
    assert all(not isinstance(layer, torch.nn.SyncBatchNorm) for layer in counting_batch_norms(model))
