"""The average of the weights against the formula, element by element."""

import torch
from torch import nn

from resnet_dist.training.ema import Ema


def test_average_by_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = Ema(model, decay=0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 8):
        model.train()(torch.randn(4, 3))  # moves the running statistics and the counter
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            old = expected[name]
            expected[name] = decay * old + (1 - decay) * value if value.is_floating_point() else value.clone()
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert expected["1.num_batches_tracked"] == 7


def test_average_does_not_learn() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.9)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert not ema.module.training
    assert ema.module.weight is not model.weight
