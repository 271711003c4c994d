"""The command line: how values are read, how mistakes are named, and what is said of other trainers' options."""

from collections.abc import Callable
from typing import Any

import pytest

from resnet_dist.cli import lr_find, summary
from resnet_dist.cli.main import VERBS, main
from resnet_dist.cli.parser import flags_of, named_as_typed, parse, read
from resnet_dist.cli.spellings import OPTIONS, VALUES
from resnet_dist.cli.spellings import VERBS as FOREIGN_VERBS
from resnet_dist.config.layers import options_of
from resnet_dist.config.schema import TrainConfig
from resnet_dist.errors import DataError, UsageError

Refused = Callable[..., str]


def config(*typed: str) -> TrainConfig:
    made: TrainConfig = parse(TrainConfig, ["photos", *typed], "resnet-dist train")
    return made


def problems(*typed: str) -> list[str]:
    with pytest.raises(UsageError) as error:
        config(*typed)
    return error.value.problems


# Values


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        (["-b7"], "batch_size", "7"),
        (["-b=7"], "batch_size", "7"),
        (["--lr", "-1"], "lr", "-1"),
        (["--lr", "-1e3"], "lr", "-1e3"),
        (["--mean", "-.5,0,0"], "mean", "-.5,0,0"),
        (["--trainable", "-layer4 all"], "trainable", "-layer4 all"),
        (["--trainable=-layer4"], "trainable", "-layer4"),
        (["--sync-bn"], "sync_bn", "on"),
        (["--sync_bn", "--compile"], "compile", "on"),
        (["--compile", "off"], "compile", "off"),
        (["--resume"], "resume", "auto"),
        (["--resume", "-o", "x"], "resume", "auto"),
        (["--resume", "runs/x"], "resume", "runs/x"),
        (["--", "-photos-"], "data", "-photos-"),
        (["--no-model-ema"], "ema", False),
    ],
)
def test_value_is_read(typed: list[str], name: str, value: Any) -> None:
    words = read(TrainConfig, typed)
    assert (words.given[name], words.problems) == (value, [])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (
            ["--mixed-precision", "-x"],
            "--mixed-precision needs a value; one that begins with '-' is typed as ",
        ),
        (["--mixed-precision"], "--mixed-precision needs a value"),
        (["--lr", "--epochs", "3"], "--lr needs a value"),
        (
            ["--trainable", "-layer4"],
            "--trainable needs a value; one that begins with '-' is typed as --tr",
        ),
        (["--nesterov=true"], "--nesterov true: it takes no value; type --nesterov, or --no-nesterov for the opposite"),
        (
            ["--no-report", "False"],
            "--no-report False: it takes no value; type --no-report, or --report for",
        ),
    ],
)
def test_missing_or_superfluous_value_is_one_line(typed: list[str], line: str) -> None:
    (said,) = problems(*typed)
    assert said.startswith(line)


def test_last_of_an_option_given_twice_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts that pass their arguments on rely on it, so nothing is said."""
    assert config("--mixed-precision", "bf16", "--amp-dtype", "no").system.mixed_precision == "no"
    assert capsys.readouterr().err == ""


# Mistakes


@pytest.mark.parametrize(
    "typed", [["--frobnicate", "5"], ["--frobnicate=5"], ["--frobnicate"], ["-x", "5"], ["--foo", "a", "--epochs", "3"]]
)
def test_unknown_option_with_any_value_gives_one_line(typed: list[str]) -> None:
    (line,) = problems(*typed)
    assert line.startswith("unknown option")
    with pytest.raises(UsageError) as error:  # the value of an unknown option may also be the data
        parse(TrainConfig, [*typed, "photos"], "train")
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--epoch", "; did you mean '--epochs'?"),
        ("--label-smoot", "; did you mean '--label-smoothing'?"),
        ("--wieght-decay", "; did you mean '--weight-decay'?"),
        ("--mean-x", "; did you mean '--mean'?"),
        ("--nothing-like-it", ""),
    ],
)
def test_near_option_is_suggested(typed: str, said: str) -> None:
    assert problems(f"{typed}=1") == [f"unknown option '{typed}'{said}"]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["--lr-scheduler", "x"], "--lr-scheduler x: must be one of step"),
        (["-b", "0"], "-b 0: must be at least 1"),
        (["--per_device_train_batch_size", "0"], "--per-device-train-batch-size 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--optimizer", "adam", "--nesterov"], "--nesterov needs --optimizer sgd"),
    ],
)
def test_error_names_the_option_as_it_was_typed(refused: Refused, typed: list[str], line: str) -> None:
    assert refused(2, "train", "photos", *typed).startswith(f"resnet-dist train: error: {line}")


def test_later_errors_name_the_option_as_it_was_typed_too() -> None:
    named = named_as_typed(TrainConfig, ["--image-size", "8", "--mean=0,0,0"])
    with pytest.raises(DataError, match="x: leave it out, --image-size is 8; see --mean"), named:
        raise DataError("x: leave it out, --img-size is 8; see --mean")


# Other trainers


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--device", "0"], "unknown option '--device': GPUs are used if there are any"),
        (["--batch", "16"], "type --batch-size (images per process) or --global-batch-size"),
        (["--amp"], "type --mixed-precision bf16 or fp16"),
        (["--bf16"], "unknown option '--bf16': type --mixed-precision bf16"),
        (["--fp16", "True"], "unknown option '--fp16': type --mixed-precision fp16"),
        (["--vflip", "0.5"], "there is no vertical flip"),
        (["--data-path", "photos"], "unknown option '--data-path': type --data"),
        (["--pretrained"], "pretrained weights are the default"),
        (["--lr-scheduler", "cosineannealinglr"], "--lr-scheduler cosineannealinglr: type cosine"),
        (["--sched", "steplr"], "did you mean 'step'?"),
        (["--lr-scheduler", "reducelronplateau"], "type plateau"),
        (["--aa", "rand-m9-mstd0.5"], "--aa rand-m9-mstd0.5: type randaug"),
        (["--optim", "adamw_torch"], "unknown option '--optim': type --opt"),
        (["--opt", "adamw_torch"], "did you mean 'adamw'?"),
        (["--freeze", "10"], "type --trainable head, or a recipe such as --recipe feature-extractor"),
        (["--name", "x"], "type --output-dir FOLDER"),
        (["--project", "x"], "type --output-dir FOLDER"),
        (["--exist-ok"], "type --overwrite to replace the run"),
        (["--gpus", "2"], "accelerate launch --num_processes N"),
        (["--num-classes", "10"], "the classes are the folders"),
        (["--warmup-steps", "10"], "such as --warmup 100steps"),
        (["--lr0", "0.1"], "unknown option '--lr0': type --lr"),
        (["epochs=3"], "unexpected argument 'epochs=3': type --epochs 3"),
        (["imgsz=64"], "unexpected argument 'imgsz=64': type --imgsz 64"),
        (["batch=64"], "unexpected argument 'batch=64': type --batch-size (images"),
    ],
)
def test_foreign_spelling_gets_one_line_that_helps(typed: list[str], said: str) -> None:
    (line,) = problems(*typed)
    assert said in line


def test_foreign_spellings_of_our_own_options_need_no_hint() -> None:
    for typed in (["--imgsz", "64"], ["--weight-decay", "0.1"], ["--wd", "0.1"], ["--num-train-epochs", "3"]):
        assert read(TrainConfig, typed).problems == []


def test_hints_name_existing_options() -> None:
    """And no foreign spelling is one of ours, which would never be looked up."""
    flags = flags_of(TrainConfig)
    assert [foreign for foreign in OPTIONS if foreign in flags] == []
    assert [text for text in OPTIONS.values() if text.startswith("--") and text not in flags] == []
    named = {option.name: str(option.kind) for option in options_of(TrainConfig)}
    assert [text for name, texts in VALUES.items() for text in texts.values() if f"'{text}'" not in named[name]] == []


def test_hint_of_an_option_that_the_verb_lacks_is_not_given() -> None:
    assert read(summary.Config, ["--lr0", "1"]).problems == ["unknown option '--lr0'"]


@pytest.mark.parametrize("verb", FOREIGN_VERBS)
def test_foreign_verb_gets_one_line_that_helps(refused: Refused, verb: str) -> None:
    said = refused(2, verb, "x", "--foo")
    assert said.startswith(f"resnet-dist {verb}: error: there is no verb '{verb}': ")
    assert len(said.splitlines()) == 1
    assert FOREIGN_VERBS[verb].split()[0] in VERBS


# Help


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", ["train", "lr-find", "compare"])
def test_help_shows_the_common_options_and_names_the_rest(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = help_of(capsys, verb, "--help")
    lines = [line for line in out.splitlines() if line.startswith("  -")]
    assert 12 <= len(lines) <= 20
    assert f"resnet-dist {verb} --help-all shows all " in out
    for flag in ("--model", "--epochs", "--batch-size", "--lr", "--output-dir", "--workers"):
        assert any(flag in line for line in lines)
    assert len(help_of(capsys, verb, "--help-all").splitlines()) > 3 * len(out.splitlines())


def test_train_help_shows_fifteen_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert len([line for line in help_of(capsys, "train", "-h").splitlines() if line.startswith("  -")]) == 15


def test_help_shows_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    out = " ".join(help_of(capsys, "train", "--recipe", "cifar10-from-scratch", "--help").split())
    assert "(default with cifar10-from-scratch: resnet18)" in out
    assert "(default: sgd)" in out
    everything = " ".join(help_of(capsys, "train", "--help-all", "--recipe", "gradual-unfreeze").split())
    assert "(default with gradual-unfreeze: head then layer4 head then" in everything


def test_help_with_an_unknown_recipe(refused: Refused) -> None:
    assert "there is no recipe 'x'" in refused(2, "train", "--help", "--recipe", "x")


def test_help_leaves_out_what_the_verb_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    out = help_of(capsys, "lr-find", "--help")
    assert not any(f"--{name.replace('_', '-')}" in out for name in lr_find.Config.REFUSED)
