"""A setting's way: recipe < TOML file < command line, with every mistake reported, at once and in words."""

import dataclasses
import datetime
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.cli import summary
from resnet_dist.cli.parser import parse, read
from resnet_dist.config.layers import Option, build, options_of
from resnet_dist.config.recipes import layers, texts
from resnet_dist.config.schema import ARCHITECTURES, Duration, Phase, TrainConfig
from resnet_dist.config.stored import found_again, portable, read_toml, to_toml
from resnet_dist.errors import UsageError
from resnet_dist.report.run import ReportConfig, run_report

OPTIONS = {option.name: option for option in options_of(TrainConfig)}
SECTIONS = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in ("recipe", "phase")]


def config(*arguments: str | Path) -> TrainConfig:
    """What `resnet-dist train photos ...` would take."""
    made: TrainConfig = parse(TrainConfig, ["photos", *map(str, arguments)], "resnet-dist train")
    return made


def problems(*arguments: str | Path) -> list[str]:
    with pytest.raises(UsageError) as error:
        config(*arguments)
    return error.value.problems


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Write a config file."""

    def write(content: str | bytes) -> Path:
        file = tmp_path / "config.toml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


Write = Callable[[str | bytes], Path]
reproducible = settings(derandomize=True, deadline=None, database=None)


# Precedence


@pytest.mark.parametrize(
    ("place", "recipe", "in_file", "typed", "values"),
    [
        ("optim.lr", "discriminative", "2e-3", ["--lr", "3e-3"], (None, 1e-3, 2e-3, 3e-3)),
        ("optim.opt", "discriminative", '"adamw"', ["--opt", "rmsprop"], ("sgd", "adam", "adamw", "rmsprop")),
        ("data.batch_size", "bn-only", "128", ["--batch-size", "8"], (32, 64, 128, 8)),
        ("model.head_hidden", "deep-head", "[64]", ["--head-hidden", "9,8,7"], ((512,), (512, 256), (64,), (9, 8, 7))),
        (
            "schedule.lr_step_size",
            "full-finetune",
            "5",
            ["--lr-step-size", "100steps"],
            (Duration(7), Duration(7), Duration(5), Duration(100, "steps")),
        ),
        (
            "preprocess.mean",
            "cifar10-from-scratch",
            "[0.5, 0.5, 0.5]",
            ["--mean", "0.1 0.2 0.3"],
            (None, (0.4914, 0.4822, 0.4465), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3)),
        ),
        (
            "optim.decay_norm_and_bias",
            "cifar10-from-scratch",
            "false",
            ["--decay-norm-and-bias"],
            (False, True, False, True),
        ),
    ],
)
def test_file_overrides_recipe_and_command_line_overrides_file(
    toml: Write, place: str, recipe: str, in_file: str, typed: list[str], values: tuple[Any, ...]
) -> None:
    """The values without anything, with the recipe, with a file too, and with the option typed too."""
    section, name = place.split(".")
    file = ["-c", toml(f"[{section}]\n{name} = {in_file}\n")]
    levels = [[], ["--recipe", recipe], ["--recipe", recipe, *file], ["--recipe", recipe, *file, *typed]]
    assert [getattr(getattr(config(*level), section), name) for level in levels] == list(values)


def test_the_order_on_the_command_line_does_not_matter(toml: Write) -> None:
    file = toml("[optim]\nlr = 2e-3\n")
    assert config("--lr", "3e-3", "-c", file, "--recipe", "bn-only") == config(
        "--recipe", "bn-only", "-c", file, "--lr", "3e-3"
    )


def test_the_last_of_one_option_counts() -> None:
    assert config("--lr", "1", "--learning-rate", "2").optim.lr == 2


def test_sections_are_merged_field_by_field(toml: Write) -> None:
    made = config("--recipe", "discriminative", "-c", toml("[optim]\nweight_decay = 0.5\n"), "--momentum", "0.1")
    assert (made.optim.opt, made.optim.weight_decay, made.optim.momentum) == ("adam", 0.5, 0.1)


def test_phases_of_a_file_replace_those_of_the_recipe(toml: Write) -> None:
    file = toml('[[phase]]\ntrainable = "layer4 head"\n')
    assert config("--recipe", "discriminative", "-c", file).phase == (Phase(trainable="layer4 head"),)


def test_a_file_may_name_its_recipe(toml: Write) -> None:
    file = toml('recipe = "bn-only"\n[optim]\nlr = 0.5\n')
    made = config("-c", file)
    assert (made.recipe, made.phase[0].trainable, made.optim.lr) == ("bn-only", "head batchnorm", 0.5)
    assert config("-c", file, "--recipe", "deep-head").recipe == "deep-head"


@pytest.mark.parametrize("recipe", texts())
def test_every_recipe_is_a_valid_config_without_more(recipe: str) -> None:
    made = config("--recipe", recipe)
    assert made.recipe == recipe
    for section, values in layers()[recipe].items():
        if section != "phase":
            assert set(values) <= {f.name for f in dataclasses.fields(getattr(made, section))}
    assert len(made.phase) == len(layers()[recipe]["phase"])


# Spellings


@pytest.mark.parametrize(
    "arguments",
    [["--batch-size", "7"], ["--batch_size", "7"], ["--batch-size=7"], ["--batch_size=7"], ["-b", "7"], ["-b7"]],
)
def test_hyphens_and_underscores_are_one(arguments: list[str]) -> None:
    assert config(*arguments).data.batch_size == 7


@pytest.mark.parametrize("arguments", [["--weights", "my_own-w.pth"], ["--weights=my_own-w.pth"]])
def test_underscores_of_values_stay(arguments: list[str]) -> None:
    assert config(*arguments).model.weights == "my_own-w.pth"


def test_options_are_not_abbreviated() -> None:
    """An abbreviation would change its meaning when an option is added."""
    assert any("--epoch" in line for line in problems("--epoch", "3"))


def another(option: Option) -> str:
    """A valid value that is not the default."""
    kind = option.kind
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return str(next(choice for choice in typing.get_args(kind) if choice != option.default))
    texts_by_kind = {float: "0.25", Duration: "3", str: "text"}
    named = {"mean": "0.1,0.2,0.3", "std": "0.3,0.2,0.1", "crop_scale": "0.5,0.9", "head_hidden": "5,6"}
    named |= {"lr_milestones": "2,50steps", "lr_groups": "head=0.5 stem=0.125", "tracker": "tensorboard"}
    named |= {"cache_features": "4"}
    return named.get(option.name) or texts_by_kind.get(kind) or str((option.default or 63) + 1)


def spelled(option: Option, flag: str) -> list[str]:
    return [flag] if option.kind is bool else [flag, another(option)]


def changed(option: Option) -> list[str]:
    """The option typed such that it is not the default."""
    if option.name == "resume":
        return ["--resume", "auto"]
    return [f"--no-{option.flag[2:]}"] if option.default is True else spelled(option, option.flag)


def test_every_alias_means_its_option() -> None:
    offenders = [
        flag
        for option in OPTIONS.values()
        for flag in (*([] if option.positional else [option.flag]), *option.aliases)
        if read(TrainConfig, spelled(option, flag)).given
        != {option.name: True if option.kind is bool else another(option)}
    ]
    assert offenders == []


def test_no_spelling_means_two_things() -> None:
    spellings = [flag for option in OPTIONS.values() for flag in (option.flag, *option.aliases) if flag != "--data"]
    assert len(spellings) == len(set(spellings))
    assert not set(spellings) & {"--recipe", "-c", "--config", "--phase", "--debug", "-h", "--help"}


EXTRA = {"stem": ["--weights", "none"], "resume": ["--output-dir", "no-such-folder"], "cache_dir": ["--cache", "disk"]}
EXTRA["augment_on"] = ["--cache", "device"]


# --init-from brings settings of an old run along, as a recipe does: tests/training/test_init_from.py.
PLAIN = [option for option in OPTIONS.values() if option.name != "init_from"]


def test_every_option_reaches_its_field_and_no_other() -> None:
    assert [option.name for option in PLAIN if not reaches_its_field(option)] == []


def reaches_its_field(option: Option) -> bool:
    extra = EXTRA.get(option.name, [])
    before, after = config(*extra), config(*extra, *changed(option))
    owner = before.phase[0] if option.section == "phase" else getattr(before, option.section)
    new_owner = after.phase[0] if option.section == "phase" else getattr(after, option.section)
    restored = dataclasses.replace(new_owner, **{option.name: getattr(owner, option.name)})
    whole = {"phase": (restored,)} if option.section == "phase" else {option.section: restored}
    changes = getattr(new_owner, option.name) != getattr(owner, option.name)
    return changes and dataclasses.replace(after, **whole) == before


def test_every_switch_can_be_turned_off(toml: Write) -> None:
    switches = [option for option in OPTIONS.values() if option.kind is bool]
    assert len(switches) > 5
    for option in switches:
        file = toml(f"[{option.section}]\n{option.name} = true\n")
        assert getattr(getattr(config("-c", file), option.section), option.name) is True
        off = config("-c", file, f"--no-{option.flag[2:]}")
        assert getattr(getattr(off, option.section), option.name) is False, option.name


# Mistakes


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--learning-rte", "1"], "unknown option '--learning-rte'; did you mean '--learning-rate'?"),
        (["--batchsize=3"], "unknown option '--batchsize'; did you mean '--batch-size'?"),
        (["--optimiser", "sgd"], "unknown option '--optimiser'; did you mean '--optimizer'?"),
        (["--label_smothing", "0"], "unknown option '--label-smothing'; did you mean '--label-smoothing'?"),
        (["--frobnicate"], "unknown option '--frobnicate'"),
        (["more"], "unexpected argument 'more'"),
        (["--sched", "cosin"], "did you mean 'cosine'?"),
        (["--model", "resnet_50"], "must be one of " + ", ".join(ARCHITECTURES) + "; did you mean 'resnet50'?"),
        (["--opt", "lion"], "--opt lion: must be one of sgd, adam, adamw, rmsprop, adagrad"),
        (["--recipe", "discriminativ"], "there is no recipe 'discriminativ'; did you mean 'discriminative'?"),
        (["--recipe", "xyz"], "`resnet-dist recipes` lists them"),
        (["--lr", "fast"], "--lr fast: must be a number, not 'fast'"),
        (["--epochs", "1.5"], "--epochs 1.5: must be a whole number, not '1.5'"),
        (["--warmup", "long"], "'long' is not a duration such as 7, 0.5epochs or 200steps"),
        (["--lr-milestones", "3,x"], "'x' is not a duration"),
        (["--lr-groups", "head"], 'must be pairs such as "layer4=1e-4 head=1e-3"'),
        (["--lr-groups", "neck=1"], "there is no stage 'neck'; the stages are stem, layer1"),
        (["--mean", "0.5"], "--mean: three values are needed, one per channel, not 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--hflip", "1.5"], "--hflip 1.5: must be at least 0 and at most 1"),
        (["--lr"], "--lr"),
        (["-c", "nowhere.toml"], "nowhere.toml: cannot be read (No such file or directory)"),
        (
            ["--lr-backbone", "1", "--layer-decay", "0.5"],
            "--lr-backbone and --lr-decay-per-stage both set the learning rate",
        ),
        (["--stem", "small"], "--stem small has no pretrained weights DEFAULT: add --weights none"),
        (["--recipe", "discriminative", "--epochs", "1"], "must be at least 2, as the phases before the last take 1"),
        (["--mixup", "0.2", "--batch-size", "7"], "must be even"),
        (["--group-by", "("], "is not a regular expression"),
    ],
)
def test_mistake_gives_a_clear_message(typed: list[str], said: str) -> None:
    assert any(said in line for line in problems(*typed)), problems(*typed)


def test_all_mistakes_are_reported_at_once(toml: Write) -> None:
    """Of the options, the file, the phases and what does not fit together."""
    file = toml('[data]\nbatch_sise = 3\n[schedule]\nlr_gamma = "half"\n[augment]\nhflip = 7\n')
    typed = ["--epochs", "0", "--lr", "-1", "--model", "resnet51", "--frobnicate", "--phase", "3.epochs=1"]
    found = problems("--recipe", "discriminativ", "-c", file, *typed)
    words = ("batch_sise", "lr-gamma", "hflip", "--epochs 0", "--lr -1", "resnet51", "frobnicate", "3.epochs", "recipe")
    for word in words:
        assert any(word in line for line in found), word


@pytest.mark.parametrize(
    "typed",
    [["--epochs", "0"], ["--lr", "-1"], ["--model", "x"], ["--hflip", "2"], ["--frobnicate"]],
)
def test_one_mistake_is_one_line(typed: list[str]) -> None:
    assert len(problems(*typed)) == 1


def test_missing_data_is_a_mistake_too() -> None:
    with pytest.raises(UsageError, match="DATA is missing"):
        parse(TrainConfig, [], "train")


@pytest.mark.parametrize("name", ["lr", "lr_backbone", "weight_decay", "hflip", "mixup", "mean", "dropout", "lr_scale"])
@pytest.mark.parametrize("value", ["nan", "NaN", "-nan"])
def test_nan_is_not_a_number(name: str, value: str) -> None:
    flag = f"{OPTIONS[name].flag}={value}"
    assert any(line.startswith(OPTIONS[name].flag) and "must be a number" in line for line in problems(flag))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "place", ["optim.lr", "optim.lr_backbone", "optim.weight_decay", "augment.mixup", "system.dist_timeout"]
)
def test_numbers_of_a_file_are_finite(toml: Write, place: str, value: str) -> None:
    section, name = place.split(".")
    assert problems("-c", toml(f"[{section}]\n{name} = {value}\n"))


@pytest.mark.parametrize("option", ["--lr-groups=head=inf", "--lr-groups=head=nan", "--lr-scale=inf", "--lr=1e999"])
def test_rates_are_finite(option: str) -> None:
    assert problems(option)


# Phases on the command line


def test_one_field_of_one_phase() -> None:
    before = config("--recipe", "discriminative", "--epochs", "9").phase
    settings = ["--phase", "1.epochs=3", "--phase", "2.backbone-lr-scale=0.5", "--phase=2.trainable=all -stem"]
    after = config("--recipe", "discriminative", "--epochs", "9", *settings).phase
    assert after == (
        dataclasses.replace(before[0], epochs=3),
        dataclasses.replace(before[1], backbone_lr_scale=0.5, trainable="all -stem"),
    )


def test_recipes_are_not_changed_by_it() -> None:
    before = config("--recipe", "discriminative")
    config("--recipe", "discriminative", "--phase", "1.trainable=layer4", "--lr", "7")
    assert config("--recipe", "discriminative") == before


@pytest.mark.parametrize(
    "text",
    ["3.epochs=1", "0.epochs=1", "x.epochs=1", "1.no=1", "1.epochs", "1.epochs=", "epochs=1", "", "².epochs=1"],
)
def test_phase_setting_that_is_none_is_refused(text: str) -> None:
    """And what would be one is said."""
    (line,) = problems("--recipe", "discriminative", f"--phase={text}")
    assert "N.FIELD=VALUE, N from 1 to 2" in line
    assert all(field.name in line for field in dataclasses.fields(Phase))


@pytest.mark.parametrize("text", ["1.epochs=x", "2.lr_scale=big", "2.batch_norm_stats=off", "2.lr_scale=nan"])
def test_wrong_value_of_a_phase_is_refused(text: str) -> None:
    name, value = text[2:].split("=")
    found = problems("--recipe", "discriminative", "--phase", text)
    assert any(name.replace("_", "-") in line and value in line for line in found), found


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--trainable", "layer4 head", "trainable"),
        ("--batch-norm-stats", "frozen", "batch_norm_stats"),
        ("--lr-scale", "0.5", "lr_scale"),
        ("--backbone-lr-scale", "0.5", "backbone_lr_scale"),
    ],
)
def test_phase_options_are_for_one_phase(option: str, value: str, field: str) -> None:
    """With several it is unclear which, and the clear way is said."""
    for arguments in ([], ["--recipe", "bn-only"]):
        assert str(getattr(config(*arguments, option, value).phase[0], field)) == value
    (line,) = problems("--recipe", "discriminative", option, value)
    assert line == f"{option} is ambiguous with 2 phases: give --phase N.{field}={value}"


def test_the_last_phase_takes_the_rest() -> None:
    assert config("--recipe", "gradual-unfreeze").phase_epochs() == (1, 1, 1, 3)
    assert config("--recipe", "deep-head", "--epochs", "20").phase_epochs() == (1, 19)


def test_only_the_last_phase_may_leave_its_length_out(toml: Write) -> None:
    (line,) = problems("-c", toml('[[phase]]\ntrainable = "head"\n[[phase]]\n'))
    assert line == "phase 1: epochs are missing; only the last phase may leave them out"


def test_length_of_the_last_phase_is_not_overridden_in_silence() -> None:
    """What is typed holds, or is refused."""
    try:
        made = config("--recipe", "discriminative", "--phase", "2.epochs=5")
    except UsageError as error:
        assert "epochs" in str(error)
    else:
        assert made.phase_epochs()[1] == 5


# TOML out and in


def returned(made: TrainConfig, toml: Write) -> TrainConfig:
    """After a round trip through the stored form."""
    back: TrainConfig = parse(TrainConfig, ["-c", str(toml(to_toml(made)))], "resnet-dist train")
    return back


@pytest.mark.parametrize("recipe", texts())
def test_stored_config_of_a_recipe_is_the_same_config(toml: Write, recipe: str) -> None:
    made = config("--recipe", recipe)
    assert returned(made, toml) == made
    assert to_toml(returned(made, toml)) == to_toml(made)


PASSING = ("output_dir", "overwrite", "resume", "dry_run")


def test_stored_option_is_the_same_option(toml: Write) -> None:
    offenders = []
    for option in PLAIN:
        if option.name not in PASSING:
            made = config(*EXTRA.get(option.name, []), *changed(option), "--recipe", "full-finetune")
            offenders += [option.name] if returned(made, toml) != made else []
    assert offenders == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lr-step-size", "1234567steps"],
        ["--lr-step-size", "0.333333333333"],
        ["--lr-milestones", "1234567steps,9999999steps"],
        ["--lr", "0.1234567890123456789"],
        ["--lr-groups", "head=1e-300 stem=3"],
        ["--seed", str(2**63 - 1)],
        ["--weights", 'we"ird\\na\nme.pth'],
        ["--head-hidden", "", "--head", "linear"],
        ["--trainable", "layer4.1.*  -*.bias"],
    ],
)
def test_stored_value_is_exactly_the_value(toml: Write, arguments: list[str]) -> None:
    made = config(*arguments)
    assert returned(made, toml) == made


def test_stored_path_may_be_any_path(tmp_path: Path) -> None:
    """Linux knows names that are no text."""
    made = parse(TrainConfig, [b"photos-\xff".decode(errors="surrogateescape")], "train")
    file = tmp_path / "config.toml"
    file.write_bytes(to_toml(made).encode(errors="surrogateescape"))
    assert parse(TrainConfig, ["-c", str(file)], "train") == made


def test_output_folder_is_not_stored_in_the_config(tmp_path: Path) -> None:
    """The same training in another folder is the same config."""
    made = config("-o", tmp_path, "--overwrite", "--dry-run", "--epochs", "3")
    assert to_toml(made) == to_toml(config("--epochs", "3"))


def test_config_in_a_checkpoint_has_no_paths(tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_text("a = 1")
    paths = ["--val-dir", tmp_path, "--weights", tmp_path / "my.pth", "--class-weights", tmp_path / "w.toml"]
    made = parse(TrainConfig, [str(tmp_path), "-o", str(tmp_path), *map(str, paths)], "train")
    carried = json.dumps(portable(made))
    assert str(tmp_path) not in carried and "my.pth" in carried


@pytest.mark.parametrize("recipe", texts())
def test_stored_config_serves_other_verbs(toml: Write, recipe: str) -> None:
    """`summary -c` of a run's config takes its model and phases."""
    made = config("--recipe", recipe)
    taken = parse(summary.Config, ["-c", str(toml(to_toml(made)))], "resnet-dist summary")
    assert (taken.model, taken.phase) == (made.model, made.phase)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[optim]\nlr = "fast"', "--lr fast: must be a number"),
        ("[optim]\nlr = true", "--lr True: must be a number, not true"),
        ("[optim]\nlr = [1.0]", "--lr [1.0]: must be a number"),
        ("[optim]\nlr = 2020-01-01", "--lr 2020-01-01: must be a number"),
        ("[optim]\nlr = {a = 1}", "must be a number"),
        ("[data]\nbatch_size = 1.5", "--batch-size 1.5: must be a whole number"),
        ("[data]\nbatch_size = true", "--batch-size True: must be a whole number, not true"),
        ("[data]\ndrop_last = 1", "--drop-last 1: must be true or false, not 1"),
        ('[data]\ndrop_last = "yes"', "must be true or false"),
        ("[data]\nval_dir = 5", "--val-dir 5: must be text"),
        ("[data]\nval_dir = false", "--val-dir False: must be text"),
        ("[model]\nmodel = 50", "must be one of resnet18"),
        ('[model]\nhead_hidden = ["a"]', "must be a whole number, not 'a'"),
        ("[model]\nhead_hidden = [true]", "must be a whole number, not true"),
        ("[model]\nhead_hidden = [[1]]", "must be a whole number"),
        ("[preprocess]\nmean = [0.1, nan, 0.1]", "--mean"),
        ("[schedule]\nwarmup = true", "--warmup True: must be a duration, not true"),
        ("[schedule]\nwarmup = -1", "'-1' is not a duration"),
        ("[schedule]\nwarmup = [1]", "--warmup"),
        ("[schedule]\nlr_step_size = {}", "--lr-step-size"),
        ("[schedule]\nlr_step_size = 2020-01-01", "--lr-step-size"),
        ("[schedule]\nlr_milestones = [[1]]", "--lr-milestones"),
        ("[run]\nsave_every = []", "--save-every"),
        ("[optim]\nlr_groups = {head = true}", "--lr-groups"),
        ("[optim]\nlr_groups = 5", "must be pairs"),
        ("optim = 5", "[optim] must be a table"),
        ("[[optim]]\nlr = 1", "[optim] must be a table"),
        ("[phase]\nepochs = 1", "[[phase]] must be an array of tables"),
        ("phase = 5", "[[phase]] must be an array of tables"),
        ("phase = [1]", "[[phase]] must be an array of tables"),
        ("phase = []", "at least one is needed"),
        ("recipe = 5", "recipe"),
        ("recipe = []", "recipe"),
        ("[recipe]\nname = 1", "recipe"),
        ("[optm]\nlr = 1", "there is no section or key 'optm'; did you mean 'optim'?"),
        ("lr = 1", "there is no section or key 'lr'"),
        ("[optim]\nmomentun = 1", "[optim] has no 'momentun'; did you mean 'momentum'?"),
        ("[[phase]]\ntrainabel = 1", "[phase] has no 'trainabel'; did you mean 'trainable'?"),
        ("[data]\nworkers = 1" + "0" * 400, "--workers"),
    ],
)
def test_wrong_value_in_a_file_gives_a_clear_message(toml: Write, content: str, said: str) -> None:
    found = problems("-c", toml(content))
    assert any(said in line for line in found), found


def test_section_that_is_not_a_table_is_always_refused(toml: Write) -> None:
    assert any("[optim] must be a table" in line for line in problems("-c", toml("optim = 5"), "--lr", "1"))


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"\x00",
        b"[optim",
        b"lr = ",
        b"[optim]\nlr = 1\nlr = 2",
        b"x = " + b"[" * 100_000,
        b"x = " + b"9" * 5000,
        b'x = "\\ud800"',
        b"\x7fELF\x02\x01\x01",
        b'{"json": 1}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_file_that_is_no_toml_is_refused_in_one_line(toml: Write, content: bytes) -> None:
    (line,) = problems("-c", toml(content))
    assert "config.toml" in line and "\n" not in line


def test_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A hole of a terabyte: reading it would end the machine."""
    with (tmp_path / "huge.toml").open("wb") as stream:
        stream.truncate(1 << 40)
    (line,) = problems("-c", tmp_path / "huge.toml")
    assert line == f"{tmp_path}/huge.toml: not a TOML file (larger than 1 MiB)"


def test_folder_and_pipe_are_no_config_files(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for without end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="not a TOML file"):
            read_toml(path)


# Whatever stands in a file, the answer is a config of the right types or a list of problems.


ODD = [5, -5, 0, 1.5, 0.5, math.nan, math.inf, 10**400, -(10**400), "x", "", "1", "-1", "inf", "1e999", "9" * 400, "½"]
ODD += [True, False, [], [1], [[1]], ["x"], ["1"], [True], {}, {"head": 1.0}, {"head": True}, {"head": {}}, {"x": "y"}]
ODD += [datetime.date(2020, 1, 1), datetime.time(1), "a=b", "head=1", "head=nan", "=", ",", "0.5,1", "3steps", "1ep"]


def fits(kind: Any, value: Any) -> bool:
    """Whether a value is of an annotated type, by the rules of the language."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(fits(part, value) for part in arguments)
    if typing.get_origin(kind) is Literal:
        return value in arguments
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(arguments[0], item) for item in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(fits(arguments[1], item) for item in value.values())
    if kind is Duration:
        return type(value) is Duration and isinstance(value.value, int | float) and 0 <= value.value < math.inf
    return type(value) is kind and (kind is not float or not math.isnan(value))


@pytest.mark.parametrize("section", [*SECTIONS, "phase"])
def test_any_value_gives_a_config_of_the_right_types_or_problems(section: str) -> None:
    owner = Phase if section == "phase" else type(getattr(TrainConfig(), section))
    for name, kind in typing.get_type_hints(owner).items():
        for value in ODD:
            layer = {"phase": [{name: value}]} if section == "phase" else {section: {name: value}}
            made, wrong = build(TrainConfig, layer)
            part = made.phase[0] if section == "phase" else getattr(made, section)
            assert fits(kind, getattr(part, name)), (name, value)
            assert all("\n" not in line for line in [*wrong, *part.problems()])
            if made != TrainConfig():  # the value was taken
                tomllib.loads(to_toml(made))


# Durations


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("7", 7, "epochs"),
        (7, 7, "epochs"),
        (0.5, 0.5, "epochs"),
        ("0.5epochs", 0.5, "epochs"),
        ("1epoch", 1, "epochs"),
        ("1.5ep", 1.5, "epochs"),
        (" 3 epochs ", 3, "epochs"),
        ("200steps", 200, "steps"),
        ("1step", 1, "steps"),
        ("2e3 steps", 2000, "steps"),
        ("0", 0, "epochs"),
    ],
)
def test_duration_is_read(text: str | float, value: float, unit: str) -> None:
    made = Duration.parse(text)
    assert (made.value, made.unit) == (value, unit)


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "-1steps", "0.5steps", "nan", "inf", "1e999", "1e999steps", "7 days", "steps", "1 2", "1+1", "."],
)
def test_a_text_that_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Duration.parse(text)


durations = st.one_of(
    st.builds(Duration, st.floats(0, 1e6), st.just("epochs")),
    st.builds(Duration, st.integers(0, 10**12).map(float), st.just("steps")),
)


@reproducible
@given(durations)
def test_duration_survives_its_text(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(("text", "steps"), [("2", 200), ("0.5", 50), ("30steps", 30), ("0.004", 0), ("0.016", 2)])
def test_duration_in_steps_of_an_epoch_of_100(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(100) == steps


@reproducible
@given(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.lists(st.text())), max_size=3))
def test_unknown_sections_are_problems(layer: dict[str, Any]) -> None:
    _, wrong = build(TrainConfig, tomllib.loads(tomli_w.dumps(layer)))
    assert len(wrong) >= len(layer.keys() - {f.name for f in dataclasses.fields(TrainConfig)})
    assert all(re.search(r"no section or key|must be", line) for line in wrong)


def test_keywords_are_not_read_as_paths_in_a_stored_config(tmp_path: Path) -> None:
    """Also if the directory in which it was started holds files of those names; a path leads there."""
    names = ("none", "balanced", "DEFAULT", "IMAGENET1K_V1", "IMAGENET1K_V2", "own.toml", "own.pth")
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / "run.json").write_text(json.dumps({"directory": str(tmp_path)}))
    for section, setting, own in (("model", "weights", "own.pth"), ("loss", "class_weights", "own.toml")):
        words = names[:2] if section == "loss" else ("none", *names[2:5])
        for value in (*words, own):
            found = found_again({section: {setting: value}}, tmp_path)
            assert found == {section: {setting: str(tmp_path / own) if value == own else value}}


def test_a_config_without_its_run_does_not_take_this_directory() -> None:
    """Made in Python without the check of its problems, which would have reported it."""
    with pytest.raises(UsageError, match="RUN is missing"):
        run_report(ReportConfig())
