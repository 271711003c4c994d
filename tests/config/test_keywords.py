"""The config of Python keywords: what the command line makes of the same options, and errors that name the keyword."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.cli.parser import parse
from resnet_dist.config.duration import Duration
from resnet_dist.config.layers import from_keywords, keyword_signature, options_of
from resnet_dist.config.schema import Phase, TrainConfig
from resnet_dist.errors import DataError, UsageError, as_keywords


def problems(**settings: Any) -> list[str]:
    with pytest.raises(UsageError) as error:
        from_keywords(TrainConfig, {"data": "photos", **settings})
    return error.value.problems


@pytest.mark.parametrize(
    ("settings", "typed"),
    [
        ({"lr": 0.5, "epochs": 3, "nesterov": True}, ["--lr", "0.5", "--epochs", "3", "--nesterov"]),
        ({"lr": "0.5", "report": False}, ["--lr", "0.5", "--no-report"]),
        ({"mean": (0.1, 0.2, 0.3), "tracker": ["wandb"]}, ["--mean", "0.1,0.2,0.3", "--tracker", "wandb"]),
        (
            {"warmup": Duration(50, "steps"), "save_every": "20steps"},
            ["--warmup", "50steps", "--save-every", "20steps"],
        ),
        ({"lr_groups": {"head": 1, "stem": 0.1}}, ["--lr-groups", "head=1 stem=0.1"]),
        ({"val_dir": Path("other/val")}, ["--val-dir", "other/val"]),
        ({"recipe": "discriminative", "lr": 0.1}, ["--recipe", "discriminative", "--lr", "0.1"]),
        (
            {"recipe": "discriminative", "phase": ["2.lr_scale=0.1"]},
            ["--recipe=discriminative", "--phase=2.lr_scale=0.1"],
        ),
        ({"recipe": "deep-head", "phase": "1.lr_scale=2"}, ["--recipe=deep-head", "--phase=1.lr_scale=2"]),
        ({"trainable": "layer4 head", "lr_scale": 0.5}, ["--trainable", "layer4 head", "--lr-scale", "0.5"]),
        ({"output_dir": "runs/x", "resume": True}, ["--output-dir", "runs/x", "--resume", "auto"]),
        ({"output_dir": "runs/x", "resume": False}, ["--output-dir", "runs/x"]),
        ({"lr": None, "recipe": None, "phase": None, "config": None}, []),
    ],
)
def test_keywords_are_the_options(settings: dict[str, Any], typed: list[str]) -> None:
    assert from_keywords(TrainConfig, {"data": "photos", **settings}) == parse(TrainConfig, ["photos", *typed], "train")


def test_layers_are_those_of_the_command_line(tmp_path: Path) -> None:
    """Recipe < TOML file < keywords."""
    file = tmp_path / "config.toml"
    file.write_text("[optim]\nlr = 2e-3\nweight_decay = 0.5\n")
    settings = {"data": "photos", "lr": 3e-3, "recipe": "discriminative"}
    made = from_keywords(TrainConfig, {**settings, "config": file})
    assert (made.optim.lr, made.optim.weight_decay, made.optim.opt) == (3e-3, 0.5, "adam")
    assert made == from_keywords(TrainConfig, {**settings, "config": str(file)})


def test_phases_as_dicts_replace_those_of_the_recipe() -> None:
    phases = [{"trainable": "head", "epochs": 2}, {"epochs": None}]
    made = from_keywords(TrainConfig, {"data": "photos", "recipe": "gradual-unfreeze", "phase": phases})
    assert made.phase == (Phase(trainable="head", epochs=2), Phase())
    both = from_keywords(TrainConfig, {"data": "photos", "phase": [*phases, "2.lr_scale=0.1"]})
    assert both.phase[1] == dataclasses.replace(made.phase[1], lr_scale=0.1)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr": -1}, "lr=-1: must be at least 0"),
        ({"img_size": "big"}, "img_size='big': must be a whole number, not 'big'"),
        ({"model": "resnet51"}, "model='resnet51': must be one of resnet18, resnet34, resnet50, resnet101, resnet152"),
        ({"weights": None}, "weights=None: must be text, not None"),
        ({"batch_size": True}, "batch_size=True: must be a whole number, not true"),
        ({"stem": "small"}, "stem small has no pretrained weights DEFAULT: add weights='none'"),
        ({"learning_rate": 1}, "there is no keyword 'learning_rate'; it is called 'lr'"),
        ({"batchsize": 1}, "there is no keyword 'batchsize'; did you mean 'batch_size'?"),
        ({"phase": [3]}, "[[phase]] must be an array of tables"),
        ({"nesterov": True, "opt": "adam"}, "nesterov needs opt sgd with a momentum above 0"),
    ],
)
def test_error_names_the_keyword(settings: dict[str, Any], line: str) -> None:
    found = problems(**settings)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_all_problems_are_in_one_error() -> None:
    assert len(problems(lr=-1, epochs=0, frobnicate=1, recipe="x", phase="7.epochs=1")) == 5


def test_other_errors_name_the_keyword_too() -> None:
    error = DataError("a--b/c.png: broken; leave it out with --bad-images skip or --no-report")
    assert str(error.in_python()) == "a--b/c.png: broken; leave it out with bad_images skip or report=False"
    assert as_keywords("give --epochs above 3, or --init-from") == "give epochs above 3, or init_from"


def test_signature_lists_every_option_with_its_default() -> None:
    signature = keyword_signature(TrainConfig)
    names = list(signature.parameters)
    assert names[:4] == ["data", "recipe", "config", "phase"]
    assert set(names[4:]) == {option.name for option in options_of(TrainConfig)} - {"data"}
    assert signature.parameters["batch_size"].default == 32
    assert signature.parameters["lr"].kind is inspect.Parameter.KEYWORD_ONLY
