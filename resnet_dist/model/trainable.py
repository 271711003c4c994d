"""What learns: two axes, the parameters that take gradients and the BatchNorm statistics that update."""

from fnmatch import fnmatchcase

import torch
from torch import nn

from resnet_dist.config.schema import STAGES, Phase
from resnet_dist.errors import UsageError
from resnet_dist.model.batch_norm import BatchNorm, backbone_batch_norms
from resnet_dist.model.resnet import stage_of


def select(model: nn.Module, text: str) -> list[str]:
    """The names of the parameters that a selection means, in the model's order.

    `text` holds words, taken from left to right, each adding or, with a leading -, taking away: `all`, a stage (head,
    stem, layer1..layer4), `batchnorm` (weights and biases of the backbone's BatchNorm), or a pattern of parameter
    names such as `layer4.1.*`. Raises UsageError for a word that means nothing and for an empty result.
    """
    chosen: set[str] = set()
    for word in text.replace(",", " ").split():
        named = _meant(model, word.removeprefix("-"))
        chosen = chosen - named if word.startswith("-") else chosen | named
    if not chosen:
        raise UsageError(f"--trainable '{text}' leaves nothing to learn")
    return [name for name, _ in model.named_parameters() if name in chosen]


def _meant(model: nn.Module, word: str) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    if word == "all":
        return set(names)
    if word in STAGES:
        return {name for name in names if stage_of(name) == word}
    if word == "batchnorm":
        return {f"{layer}.{kind}" for layer, _ in backbone_batch_norms(model) for kind in ("weight", "bias")}
    matching = {name for name in names if fnmatchcase(name, word) or fnmatchcase(name, f"{word}.*")}
    if not matching:
        known = ", ".join(["all", *STAGES, "batchnorm"])
        raise UsageError(f"--trainable: '{word}' matches nothing; there are {known} and names such as {names[3]}")
    return matching


def set_trainable(model: nn.Module, phase: Phase) -> None:
    """Let exactly the parameters that the phase names take gradients."""
    chosen = set(select(model, phase.trainable))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameter.grad = None


def updating_batch_norms(model: nn.Module, phase: Phase) -> list[str]:
    """The BatchNorm layers of the backbone whose statistics update in the phase.

    All of them, none, or (where the phase does not say) those in stages of which something learns: the statistics of
    a stage that is frozen would otherwise drift away under weights that cannot follow.
    """
    layers = [name for name, _ in backbone_batch_norms(model)]
    if phase.batch_norm_stats is not None:
        return layers if phase.batch_norm_stats == "update" else []
    learning = {stage_of(name) for name in select(model, phase.trainable)}
    return [name for name in layers if stage_of(name) in learning]


def train_mode(model: nn.Module, phase: Phase) -> None:
    """Training mode, but evaluation mode for the BatchNorm layers whose statistics are frozen in this phase."""
    updating = set(updating_batch_norms(model, phase))
    model.train()
    for name, layer in backbone_batch_norms(model):
        layer.train(name in updating)


@torch.no_grad()
def batch_norm_of_one_value(model: nn.Module, phase: Phase, shape: tuple[int, int, int, int]) -> str | None:
    """The first BatchNorm layer that would train on one value per channel for inputs of `shape` (B, 3, H, W), if any.

    `model` is on the meta device, so nothing is computed; it is left in another mode.
    """
    found = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training and inputs[0].numel() == inputs[0].shape[1]:
            found.append(names[module])
            module.eval()  # torch would refuse it

    train_mode(model, phase)
    for module in names:
        if isinstance(module, BatchNorm):
            module.register_forward_pre_hook(look)
    model(torch.empty(*shape, device="meta"))
    return next(iter(found), None)
