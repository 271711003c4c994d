"""Split a network before a stage: the frozen part, whose outputs can be cached, and the trained part."""

from collections.abc import Iterable

from torch import nn

from resnet_dist.config.schema import STAGES
from resnet_dist.model.resnet import stage_of

# The order of torchvision's ResNet.forward; the pooled features are flattened before `fc`.
_ORDER = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")
_FIRST = {"layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7, "head": 9}


def first_changing_stage(trainable: Iterable[str], updating: Iterable[str]) -> str:
    """The first stage in which a parameter is trained or BatchNorm statistics update.

    The stages before it give the same output for the same input throughout a phase: only the head has dropout.
    """
    changing = {stage_of(name) for name in (*trainable, *updating)}
    return next(stage for stage in STAGES if stage in changing)


def cut(model: nn.Module, stage: str) -> tuple[nn.Sequential, nn.Sequential]:
    """The network before `stage` (layer1..layer4 or head), and the rest of it. Both share the model's modules.

    The first part returns (B, C, H, W) or, before the head, the pooled and flattened features (B, F).
    """
    children = dict(model.named_children())
    modules: list[nn.Module] = [children[name] for name in _ORDER]
    modules.insert(_FIRST["head"], nn.Flatten(1))
    place = _FIRST[stage] + (stage == "head")
    return nn.Sequential(*modules[:place]), nn.Sequential(*modules[place:])
