"""What learns: selections, and for every technique which weights and which statistics move."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_dist.config.layers import build as build_config
from resnet_dist.config.recipes import layers
from resnet_dist.config.schema import STAGES, ModelConfig, Phase, TrainConfig
from resnet_dist.errors import UsageError
from resnet_dist.model.resnet import Architecture, build, empty
from resnet_dist.model.trainable import (
    batch_norm_of_one_value,
    select,
    set_trainable,
    train_mode,
    updating_batch_norms,
)

PREFIXES = {"stem": ("conv1.", "bn1."), "head": ("fc.",)} | {f"layer{i}": (f"layer{i}.",) for i in range(1, 5)}
Moved = Callable[[str], bool]


def network(head: str = "linear", make: Callable[[Architecture], nn.Module] = empty) -> nn.Module:
    return make(Architecture.of(ModelConfig(model="resnet18", head=head, head_hidden=(16, 8)), 3))


def in_stages(name: str, *stages: str) -> bool:
    return any(f"{name}.".startswith(prefix) for stage in stages for prefix in PREFIXES[stage])


def norm_layers(model: nn.Module, head: bool = False) -> list[str]:
    """The BatchNorm layers of the backbone (or those of the head)."""
    found = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    return [name for name in found if in_stages(name, "head") is head]


BACKBONE_NORMS = frozenset(norm_layers(network()))


def is_norm(parameter: str) -> bool:
    return parameter.rpartition(".")[0] in BACKBONE_NORMS


def everything(_: str) -> bool:
    return True


def nothing(_: str) -> bool:
    return False


def the_head(name: str) -> bool:
    return in_stages(name, "head")


def head_and_norms(name: str) -> bool:
    return the_head(name) or is_norm(name)


def all_but_norms(name: str) -> bool:
    return not is_norm(name)


def parameters(model: nn.Module, chosen: Callable[[str], bool]) -> list[str]:
    return [name for name, _ in model.named_parameters() if chosen(name)]


@pytest.mark.parametrize("head", ["linear", "mlp", "concat-pool"])
@pytest.mark.parametrize("stage", STAGES)
def test_stage_selects_its_parameters(head: str, stage: str) -> None:
    model = network(head)
    assert select(model, stage) == parameters(model, lambda name: in_stages(name, stage)) != []


@pytest.mark.parametrize("head", ["linear", "concat-pool"])
def test_batchnorm_selects_weights_and_biases_of_the_backbone(head: str) -> None:
    """Not those of a deeper head, which are new and always learn with it."""
    model = network(head)
    assert select(model, "batchnorm") == parameters(model, is_norm)
    assert len(select(model, "batchnorm")) == 2 * 20


@pytest.mark.parametrize("head", ["linear", "concat-pool"])
def test_all_selects_everything_in_the_models_order(head: str) -> None:
    model = network(head)
    assert select(model, "all") == parameters(model, everything)
    assert select(model, "head stem layer4") == parameters(model, lambda n: in_stages(n, "stem", "layer4", "head"))


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all -head", lambda name: not in_stages(name, "head")),
        ("all -layer1 -stem", lambda name: not in_stages(name, "stem", "layer1")),
        ("all -layer4 layer4.1", lambda name: not name.startswith("layer4.0.")),
        ("-head all", everything),
        ("head -head layer2", lambda name: in_stages(name, "layer2")),
        ("layer3, layer4,head", lambda name: in_stages(name, "layer3", "layer4", "head")),
        ("  head \t layer1 ", lambda name: in_stages(name, "head", "layer1")),
        ("head head", lambda name: in_stages(name, "head")),
    ],
)
def test_words_add_and_remove_from_left_to_right(text: str, chosen: Moved) -> None:
    model = network()
    assert select(model, text) == parameters(model, chosen)


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("layer4.1.*", lambda name: name.startswith("layer4.1.")),
        ("layer4.1", lambda name: name.startswith("layer4.1.")),
        ("fc", lambda name: name.startswith("fc.")),
        ("fc.bias", lambda name: name == "fc.bias"),
        ("layer[34].*", lambda name: name.startswith(("layer3.", "layer4."))),
        ("*.conv2.weight", lambda name: name.endswith(".conv2.weight")),
        ("layer?.0.downsample", lambda name: ".downsample." in name),
        ("all -*.bias", lambda name: not name.endswith(".bias")),
        ("*.bias -fc", lambda name: name.endswith(".bias") and not name.startswith("fc.")),
    ],
)
def test_patterns_select_parameters_and_modules(pattern: str, chosen: Moved) -> None:
    model = network()
    assert select(model, pattern) == parameters(model, chosen) != []


def test_batchnorm_can_be_removed() -> None:
    model = network()
    assert select(model, "all -batchnorm") == parameters(model, all_but_norms)


@pytest.mark.parametrize("text", ["layer5", "head layer5", "all -layer5", "Head", "layer4.7.*", "conv", "all -"])
def test_unknown_word_is_an_error_that_lists_what_exists(text: str) -> None:
    with pytest.raises(UsageError) as error:
        select(network(), text)
    for known in ("all", *STAGES, "batchnorm"):
        assert known in str(error.value)


@pytest.mark.parametrize("text", ["", "  ", ",", "-head", "head -head", "all -all", "batchnorm -all"])
def test_empty_selection_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="selects no parameters"):
        select(network(), text)


def test_exactly_the_selected_parameters_get_gradients() -> None:
    """Whatever the phase before let learn; its gradients are gone."""
    model = network(make=build)
    for text in ("all", "layer2 head", "head", "all -batchnorm"):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_trainable(model, select(model, text))
        assert [name for name, p in model.named_parameters() if p.requires_grad] == select(model, text)
        assert all(parameter.grad is None for parameter in model.parameters())


def two_steps(model: nn.Module, phase: Phase) -> set[str]:
    """Two steps of plain Adam on noise under a phase; the names of the tensors that changed."""
    before = copy.deepcopy(model.state_dict())
    set_trainable(model, select(model, phase.trainable))
    train_mode(model, updating_batch_norms(model, phase))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        images, targets = torch.randn(8, 3, 64, 64), torch.randint(0, 3, (8,))
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def statistics(names: list[str]) -> set[str]:
    return {f"{name}.{what}" for name in names for what in ("running_mean", "running_var", "num_batches_tracked")}


def assert_moved(head: str, phases: list[Phase], weights: Moved, norms: Moved) -> None:
    """After the last of the phases, exactly these parameters and these layers' statistics have moved in it."""
    torch.manual_seed(0)
    model = network(head, build)
    for phase in phases:
        moved = two_steps(model, phase)
    updated = [name for name in norm_layers(model) if norms(name)] + norm_layers(model, head=True)
    expected = set(parameters(model, weights)) | statistics(updated)
    # A bias before a BatchNorm has a gradient of zero but for rounding: whether it moves says nothing.
    vain = {f"fc.{i}.bias" for i in (0, 4)} if head == "concat-pool" else set()
    assert moved - vain == expected - vain


TECHNIQUES = [
    ("feature-extractor", 1, the_head, everything),
    ("feature-extractor-bn-eval", 1, the_head, nothing),
    ("bn-only", 1, head_and_norms, everything),
    ("discriminative", 1, the_head, everything),
    ("discriminative", 2, everything, everything),
    ("discriminative-bn-frozen", 1, the_head, nothing),
    ("discriminative-bn-frozen", 2, all_but_norms, nothing),
    ("deep-head", 1, the_head, everything),
    ("deep-head", 2, everything, everything),
]


@pytest.mark.parametrize(("recipe", "number", "weights", "norms"), TECHNIQUES)
def test_technique_changes_exactly_the_stated_parameters(
    recipe: str, number: int, weights: Moved, norms: Moved
) -> None:
    """The table of the six techniques, with the phases of the shipped recipes: weights, statistics, nothing else."""
    cfg, problems = build_config(TrainConfig, layers()[recipe])
    assert not problems
    assert len(cfg.phase) == max(count for name, count, *_ in TECHNIQUES if name == recipe)
    assert_moved(cfg.model.head, list(cfg.phase[:number]), weights, norms)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("head", ()),
        ("layer4 head", ("layer4",)),
        ("layer3.1.* head", ("layer3",)),
        ("all", ("stem", "layer1", "layer2", "layer3", "layer4")),
        ("all -stem -layer1", ("layer2", "layer3", "layer4")),
    ],
)
def test_automatic_statistics_update_in_the_stages_that_learn(text: str, stages: tuple[str, ...]) -> None:
    learning = select(network(), text)
    assert_moved("linear", [Phase(trainable=text)], learning.__contains__, lambda name: in_stages(name, *stages))


def test_statistics_of_the_head_update_even_if_it_is_frozen() -> None:
    """A deeper head is new: its BatchNorm needs statistics even where the backbone's are frozen."""
    for phase in (Phase(trainable="head", batch_norm_stats="frozen"), Phase(trainable="layer4")):
        torch.manual_seed(0)
        model = network("concat-pool", build)
        assert statistics(norm_layers(model, head=True)) <= two_steps(model, phase)


@pytest.mark.parametrize("stats", ["update", "frozen", None])
def test_train_mode_sets_only_batchnorm_to_evaluation(stats: str | None) -> None:
    """Dropout stays on, and it does not matter in which mode the model was."""
    model = network("concat-pool")
    updating = updating_batch_norms(model, Phase(trainable="layer4 head", batch_norm_stats=stats))
    for start in (model.train, model.eval):
        start()
        train_mode(model, updating)
        resting = {name for name, module in model.named_modules() if not module.training}
        frozen = {None: lambda name: not in_stages(name, "layer4"), "frozen": everything, "update": nothing}[stats]
        assert resting == {name for name in norm_layers(model) if frozen(name)}


def test_synchronised_batchnorm_is_batchnorm() -> None:
    plain, phase = network(), Phase(trainable="layer2 head")
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert select(synced, "batchnorm") == select(plain, "batchnorm")
    assert updating_batch_norms(synced, phase) == updating_batch_norms(plain, phase) != []


# One value per channel


@pytest.mark.parametrize("head", ["linear", "concat-pool"])
@pytest.mark.parametrize("stem", ["standard", "small"])
def test_batch_norm_of_one_value_is_where_torch_raises(head: Any, stem: Any) -> None:
    """Over phases, image sizes and batches: the first layer named is the one at which torch's forward fails."""
    made = Architecture.of(ModelConfig(model="resnet18", head=head, head_hidden=(4,), stem=stem, weights="none"), 2)
    model, refused = build(made), 0
    passed: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_hook(lambda *_, name=name: passed.append(name))
    for phase in (Phase(), Phase(trainable="head"), Phase(trainable="all", batch_norm_stats="frozen")):
        for size, batch in ((8, 1), (16, 1), (33, 1), (8, 2)):
            shape = (batch, 3, size, size)
            named = batch_norm_of_one_value(empty(made), updating_batch_norms(model, phase), shape)
            train_mode(model, updating_batch_norms(model, phase))
            passed.clear()
            try:
                model(torch.zeros(shape))
                assert named is None
            except ValueError as error:
                assert "more than 1 value per channel" in str(error)
                assert named is not None and named not in passed
                refused += 1
    assert refused
