"""The heads, and dropout whose mask is a function of the sample."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_dist.model.head import ConcatPool, Dropout, LinearHead, deep_head, dropout_mask, mlp, set_sample_keys

WORD = (1 << 64) - 1
KEYS = torch.arange(1024, dtype=torch.int64)


def splitmix64(x: int) -> int:
    """The finaliser of Steele, Lea & Flood 2014, in Python's own integers."""
    x &= WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def assert_share(mask: torch.Tensor, expected: float) -> None:
    """The share of True lies within five standard deviations of a binomial with this probability."""
    spread = math.sqrt(expected * (1 - expected) / mask.numel())
    assert abs(mask.double().mean().item() - expected) <= 5 * spread


def signs(mask: torch.Tensor) -> torch.Tensor:
    return mask.double() * 2 - 1


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_each_feature_is_kept_with_probability_one_minus_p(p: float) -> None:
    assert_share(dropout_mask(KEYS, 512, p, layer=0), 1 - p)


@pytest.mark.parametrize("key", [0, 1, 12345, 2**62 + 7, -1, -(2**63)])
@pytest.mark.parametrize("layer", [0, 3])
def test_mask_is_splitmix64_of_key_layer_and_feature(key: int, layer: int) -> None:
    p = 0.3
    mask = dropout_mask(torch.tensor([key]), 64, p, layer)[0].tolist()
    words = [splitmix64(splitmix64(key) + splitmix64(feature + (layer << 32))) for feature in range(64)]
    assert mask == [word >> 40 >= round(p * 2**24) for word in words]


def test_mask_is_a_function_of_the_samples_key_only() -> None:
    """Permuting a batch permutes the rows, and a part of a batch has the rows that it has in the whole."""
    whole = dropout_mask(KEYS, 100, 0.4, layer=1)
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropout_mask(KEYS[order], 100, 0.4, layer=1), whole[order])
    assert torch.equal(dropout_mask(KEYS[7:9], 100, 0.4, layer=1), whole[7:9])


def test_mask_needs_no_random_state() -> None:
    before = torch.random.get_rng_state()
    dropout_mask(KEYS, 32, 0.5, layer=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_mask_of_fewer_features_is_a_prefix() -> None:
    assert torch.equal(dropout_mask(KEYS, 10, 0.5, 0), dropout_mask(KEYS, 30, 0.5, 0)[:, :10])


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_layers_draw_independently(p: float) -> None:
    for a, b in itertools.combinations(range(4), 2):
        both = dropout_mask(KEYS, 256, p, a) & dropout_mask(KEYS, 256, p, b)
        assert_share(both, (1 - p) ** 2)


@pytest.mark.parametrize("step", [1, 2, 256, 1 << 20, 1 << 32])
def test_samples_draw_independently(step: int) -> None:
    """However regular the keys are, no two samples share a pattern."""
    mask = dropout_mask(KEYS * step, 256, 0.5, layer=0)
    assert len(mask.unique(dim=0)) == len(KEYS)
    assert_share(mask[1:] == mask[:-1], 0.5)


@pytest.mark.parametrize("distance", [1, 2, 3, 8, 64])
def test_neighbouring_features_and_keys_do_not_correlate(distance: int) -> None:
    values = signs(dropout_mask(KEYS, 512, 0.5, layer=2))
    for moved, rest in ((values[distance:], values[:-distance]), (values[:, distance:], values[:, :-distance])):
        products = moved * rest
        assert abs(products.mean().item()) * math.sqrt(products.numel()) < 5


def test_features_and_samples_are_dropped_equally_often() -> None:
    values = signs(dropout_mask(KEYS, 512, 0.5, layer=0))
    for dim in (0, 1):
        deviations = values.sum(dim) / math.sqrt(values.shape[dim])
        assert deviations.abs().max() < 5
        assert 0.7 < deviations.var().item() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_scales_what_it_keeps(dtype: torch.dtype) -> None:
    layer = Dropout(0.25, layer=3)
    layer.keys = KEYS[:16]
    x = torch.rand(16, 40).to(dtype) + 1
    kept = dropout_mask(KEYS[:16], 40, 0.25, 3)
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.where(kept, x / 0.75, torch.zeros_like(x)))


@pytest.mark.parametrize("keys", [None, KEYS[:8]])
def test_dropout_is_the_identity_in_evaluation_and_at_zero(keys: torch.Tensor | None) -> None:
    x = torch.randn(8, 6)
    for layer in (Dropout(0.7, 0).eval(), Dropout(0.0, 0).train()):
        layer.keys = keys
        assert torch.equal(layer(x), x)


def test_dropout_without_keys_is_torchs_own() -> None:
    x, layer = torch.randn(50, 20), Dropout(0.3, layer=0)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    assert torch.equal(ours, F.dropout(x, 0.3))


def test_dropout_with_keys_keeps_the_mean() -> None:
    """In expectation it is the identity, as torch's is."""
    layer = Dropout(0.5, layer=0)
    layer.keys = torch.arange(20_000)
    means = layer(torch.ones(20_000, 32)).mean(0)
    assert (means - 1).abs().max() < 5 / math.sqrt(20_000)


def test_gradient_flows_through_kept_features_only() -> None:
    layer = Dropout(0.5, layer=0)
    layer.keys = KEYS[:4]
    x = torch.ones(4, 30, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropout_mask(KEYS[:4], 30, 0.5, 0) * 2.0)


def test_linear_head_is_a_linear_layer() -> None:
    head, plain = LinearHead(12, 5, dropout=0.5), nn.Linear(12, 5)
    plain.load_state_dict(head.state_dict(), strict=True)
    head.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(7, 12)
    assert torch.equal(head.eval()(x), plain(x))


def test_linear_head_drops_its_input() -> None:
    head = LinearHead(12, 5, dropout=0.5)
    set_sample_keys(head, KEYS[:7])
    x = torch.randn(7, 12)
    dropped = x * dropout_mask(KEYS[:7], 12, 0.5, 0) * 2
    torch.testing.assert_close(head(x), F.linear(dropped, head.weight, head.bias))


def test_linear_head_is_initialised_like_torchs() -> None:
    torch.manual_seed(3)
    head = LinearHead(12, 5, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(head.weight, nn.Linear(12, 5).weight)


@pytest.mark.parametrize("shape", [(2, 6, 7, 7), (1, 3, 1, 1), (3, 4, 2, 5)])
def test_concat_pool_is_average_then_maximum(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)[:, :, None, None]
    torch.testing.assert_close(ConcatPool()(x), expected)


@pytest.mark.parametrize("hidden", [(16,), (16, 8), (4, 4, 4)])
def test_mlp_is_linear_relu_dropout_then_linear(hidden: tuple[int, ...]) -> None:
    layers = list(mlp(10, hidden, 3, dropout=0.2))
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, Dropout] * len(hidden) + [nn.Linear]
    widths = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    assert widths == list(itertools.pairwise((10, *hidden, 3)))


@pytest.mark.parametrize("hidden", [(16,), (512, 256)])
def test_deep_head_is_linear_batchnorm_relu_dropout_then_linear(hidden: tuple[int, ...]) -> None:
    layers = list(deep_head(10, hidden, 3, dropout=0.2))
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU, Dropout]
    assert [type(layer) for layer in layers] == block * len(hidden) + [nn.Linear]
    assert [layer.num_features for layer in layers if isinstance(layer, nn.BatchNorm1d)] == list(hidden)
    widths = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    assert widths == list(itertools.pairwise((10, *hidden, 3)))


@pytest.mark.parametrize("make", [mlp, deep_head])
def test_dropouts_of_a_head_have_the_rate_and_different_numbers(make: Callable[..., nn.Module]) -> None:
    """Two layers of one number would drop the same features of a sample."""
    drops = [layer for layer in make(10, (6, 5, 4), 3, 0.2).modules() if isinstance(layer, Dropout)]
    assert [layer.p for layer in drops] == [0.2] * 3
    assert len({layer.layer for layer in drops}) == 3


def test_dropout_of_a_training_forward_depends_only_on_the_keys() -> None:
    head = mlp(10, (32, 32), 3, dropout=0.5)
    x = torch.randn(1, 10).expand(6, 10)
    set_sample_keys(head, torch.tensor([5, 9, 5, 9, 5, 5]))
    out = head(x)
    torch.testing.assert_close(out[[0, 1]].repeat(2, 1), out[:4])
    assert not torch.allclose(out[0], out[1])
