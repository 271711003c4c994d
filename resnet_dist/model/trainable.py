"""The parameters that are trained in a phase, and the BatchNorm statistics that update."""

from collections.abc import Collection
from fnmatch import fnmatchcase

import torch
from torch import nn

from resnet_dist.config.schema import STAGES, Phase
from resnet_dist.errors import UsageError
from resnet_dist.model.batch_norm import BatchNorm, backbone_batch_norms
from resnet_dist.model.resnet import stage_of


def select(model: nn.Module, text: str) -> list[str]:
    """The names of the parameters that a selection matches, in the model's order.

    `text` is a list of words, read from left to right. Each adds parameters or, with a leading -, removes them. A word
    is `all`, a stage (head, stem, layer1..layer4), `batchnorm` (weights and biases of the backbone's BatchNorm), or a
    pattern of parameter names such as `layer4.1.*`. Raises UsageError if a word or the whole text matches nothing.
    """
    chosen: set[str] = set()
    for word in text.replace(",", " ").split():
        named = _matching(model, word.removeprefix("-"))
        chosen = chosen - named if word.startswith("-") else chosen | named
    if not chosen:
        raise UsageError(f"--trainable '{text}' selects no parameters")
    return [name for name, _ in model.named_parameters() if name in chosen]


def _matching(model: nn.Module, word: str) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    if word == "all":
        return set(names)
    if word in STAGES:
        return {name for name in names if stage_of(name) == word}
    if word == "batchnorm":
        return {f"{layer}.{kind}" for layer, _ in backbone_batch_norms(model) for kind in ("weight", "bias")}
    matching = {name for name in names if fnmatchcase(name, word) or fnmatchcase(name, f"{word}.*")}
    if not matching:
        words = ", ".join(["all", *STAGES, "batchnorm"])
        raise UsageError(f"--trainable: '{word}' matches nothing; use {words} or names such as {names[3]}")
    return matching


def set_trainable(model: nn.Module, names: Collection[str]) -> None:
    """Enable gradients for exactly the parameters with these names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None


def updating_batch_norms(model: nn.Module, phase: Phase) -> list[str]:
    """The BatchNorm layers of the backbone whose statistics update in the phase.

    All layers, none, or by default those in stages with a trained parameter, because updating statistics in a frozen
    stage would drift away from the weights.
    """
    layers = [name for name, _ in backbone_batch_norms(model)]
    if phase.batch_norm_stats is not None:
        return layers if phase.batch_norm_stats == "update" else []
    learning = {stage_of(name) for name in select(model, phase.trainable)}
    return [name for name in layers if stage_of(name) in learning]


def train_mode(model: nn.Module, updating: Collection[str]) -> None:
    """Set training mode, but evaluation mode for the backbone's BatchNorm layers that are not among `updating`."""
    model.train()
    for name, layer in backbone_batch_norms(model):
        layer.train(name in updating)


@torch.no_grad()
def batch_norm_of_one_value(
    model: nn.Module, updating: Collection[str], shape: tuple[int, int, int, int]
) -> str | None:
    """The first BatchNorm layer that would train on one value per channel, for inputs of `shape` (B, 3, H, W), or None.

    `updating` names the layers of the backbone whose statistics update. `model` must be on the meta device, so that
    nothing is computed. Its training mode changes.
    """
    offenders = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training and inputs[0].numel() == inputs[0].shape[1]:
            offenders.append(names[module])
            module.eval()  # in training mode torch would raise an error

    train_mode(model, updating)
    for module in names:
        if isinstance(module, BatchNorm):
            module.register_forward_pre_hook(look)
    model(torch.empty(*shape, device="meta"))
    return next(iter(offenders), None)
