"""The command line: verbs, help, exit codes, and that no launcher takes our options for its own."""

import ast
import functools
import importlib
import inspect
import itertools
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import resnet_dist
from resnet_dist import errors
from resnet_dist.cli import main as cli
from resnet_dist.cli.main import VERBS, main, module_of
from resnet_dist.cli.parser import HELP, flags_of
from resnet_dist.config.layers import options_of
from resnet_dist.config.recipes import texts
from resnet_dist.errors import ResnetDistError
from resnet_dist.runtime import accelerate
from resnet_dist.runtime.wording import counted, listed, one_line, printable, shortened, suggestion
from tests.conftest import run_program

Refused = Callable[..., str]


def config_of(verb: str) -> type:
    made: type = importlib.import_module(module_of(verb)).Config
    return made


WITH_CONFIG = [verb for verb in VERBS if verb != "predict"]  # that one stands alone, with argparse
VERB_OPTIONS = [(verb, option) for verb in WITH_CONFIG for option in options_of(config_of(verb))]


def squeezed(text: str) -> str:
    """Without any white space: help texts are wrapped."""
    return "".join(text.split())


def help_of(verb: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main([verb, *(arguments or ["--help"])])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_overview_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb, text in VERBS.items():
        assert any(re.fullmatch(rf"\s+resnet-dist {verb}\s+{re.escape(text)}", line) for line in lines)
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("spelling", ["--version", "-V"])
def test_version_is_the_packages(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([spelling]) == 0
    assert capsys.readouterr().out == f"resnet-dist {resnet_dist.__version__}\n"
    assert distribution("resnet-dist").version == resnet_dist.__version__


@pytest.mark.parametrize(
    ("typed", "said"),
    [("trian", "did you mean 'train'?"), ("evaluate", "there is no verb 'evaluate'"), ("--train", "no verb '--train'")],
)
def test_unknown_verb_is_a_usage_error(refused: Refused, typed: str, said: str) -> None:
    assert said in refused(2, typed)


def test_there_is_a_module_for_every_verb() -> None:
    """And no module that no verb leads to."""
    folder = Path(resnet_dist.__file__).parent / "cli"
    modules = {
        f"resnet_dist.cli.{file.stem}"
        for file in folder.glob("*.py")
        if file.stem not in ("__init__", "main", "parser", "help", "spellings")
    }
    assert modules | {"export.predict"} == {module_of(verb) for verb in VERBS}


# Help


@pytest.mark.parametrize("verb", WITH_CONFIG)
def test_help_names_every_option_with_its_docstring(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = help_of(verb, capsys, "--help-all")
    assert squeezed(inspect.getdoc(config_of(verb)) or "no docstring") in squeezed(out)
    for option in options_of(config_of(verb)):
        name = option.name.upper() if option.positional else option.flag
        assert squeezed(name) in squeezed(out)
        assert squeezed(option.help) in squeezed(out)
        assert all(alias in squeezed(out) for alias in option.aliases if not option.positional)
    assert max(map(len, out.splitlines())) <= 120


@functools.cache
def strings_below_fields(module: str) -> set[tuple[str, str]]:
    """Every (field, string that stands right below it) of a module, found by reading its source."""
    tree = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text())
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {
        (ast.unparse(field.target), inspect.cleandoc(str(below.value.value)))
        for body in bodies
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def test_help_texts_are_sentences_below_their_fields() -> None:
    offenders = []
    for verb, option in VERB_OPTIONS:
        modules = ("resnet_dist.config.schema", "resnet_dist.config.foreign", config_of(verb).__module__)
        sources = set().union(*map(strings_below_fields, modules))
        sources |= set(getattr(config_of(verb), "HELP", {}).items())
        is_sentence = len(option.help) >= 4 and option.help[-1] in ".)"
        if not is_sentence or (option.name, option.help) not in sources:
            offenders.append(f"{verb} {option.flag}")
    assert offenders == []


@pytest.mark.parametrize("verb", WITH_CONFIG)
def test_default_in_the_help_is_the_one_that_is_taken(verb: str) -> None:
    """A verb may have other defaults than `train`: then its help says so."""
    made = config_of(verb)()
    for option in options_of(config_of(verb)):
        if option.section != "phase":
            owner = getattr(made, option.section) if option.section else made
            assert getattr(owner, option.name) == option.default, option.name


def test_printing_help_imports_nothing_heavy() -> None:
    """Help is there at once: neither torch nor what brings it, nor numpy, is imported."""
    code = f"""
import sys
from resnet_dist.cli.main import main
main([])
for verb in {WITH_CONFIG}:
    try:
        main([verb, "--help"])
    except SystemExit as left:
        assert left.code == 0
heavy = {{"torch", "torchvision", "accelerate", "safetensors", "sklearn", "matplotlib", "numpy", "PIL", "onnx",
         "onnxruntime", "rich"}}
sys.exit(f"imported: {{heavy & set(sys.modules)}}" if heavy & set(sys.modules) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_module_and_console_command_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """What `accelerate launch -m resnet_dist` runs, what pip installs, and the function."""
    assert main(["recipes"]) == 0
    expected = capsys.readouterr().out
    command = Path(sys.executable).with_name("resnet-dist")
    installed = subprocess.run([command, "recipes"], capture_output=True, text=True, timeout=60)
    for done in (run_program("recipes"), installed):
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_exit_code_reaches_the_shell() -> None:
    done = run_program("recipes", "no-such-recipe")
    assert done.returncode == 2
    assert done.stderr == "resnet-dist recipes: error: there is no recipe 'no-such-recipe'\n"
    assert done.stdout == ""


@pytest.mark.parametrize(("arguments", "code"), [(["recipes"], 0), (["recipes", "no-such-recipe"], 2)])
def test_a_program_that_succeeds_leaves_its_job(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever verb it ran. After an error other processes may be gone, and leaving could wait for them."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(cli.streams, "prepare", lambda: None)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        cli.entry(arguments)
        assert codes == [code]
        assert torch.distributed.is_initialized() == (code != 0)
    finally:
        accelerate.leave_job()


# Errors

EXIT_CODES = {
    "UsageError": 2,
    "DataError": 3,
    "MachineError": 4,
    "NonFiniteError": 5,
    "ArtifactError": 6,
}


def all_errors(root: type[ResnetDistError] = ResnetDistError) -> list[type[ResnetDistError]]:
    return [error for child in root.__subclasses__() for error in (child, *all_errors(child))]


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every verb fail."""

    def run(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "run", run)


def test_docstring_lists_every_error_with_its_exit_code() -> None:
    """In the docstring of the module, which is their documentation."""
    drawn = dict(re.findall(r"── (\w+) +(\d+) ", errors.__doc__ or ""))
    assert {error.__name__: str(error.exit_code) for error in all_errors()} == drawn
    assert drawn.items() >= {name: str(code) for name, code in EXIT_CODES.items()}.items()


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_error_is_one_line_and_an_exit_code(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    fail_with(getattr(errors, name)("cats.csv: it is wrong"), monkeypatch)
    assert refused(code, "eval", "x") == "resnet-dist eval: error: cats.csv: it is wrong\n"


def test_several_problems_are_a_line_each(refused: Refused) -> None:
    said = refused(2, "train", "--lr", "-1", "--epochs", "x").splitlines()
    assert len(said) == 3
    assert all(line.startswith("resnet-dist train: error: ") for line in said)


def test_interruption_is_130_and_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert refused(130, "train", "x") == "resnet-dist train: interrupted\n"


def test_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is none of our errors keeps its traceback; Python makes it exit code 1."""
    fail_with(ZeroDivisionError("bug"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["train", "x"])


@pytest.mark.parametrize(
    "arguments", [["--debug", "recipes", "nope"], ["recipes", "--debug", "nope"], ["recipes", "nope", "--debug"]]
)
def test_debug_anywhere_shows_the_traceback(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("resnet-dist recipes: error: there is no recipe 'nope'")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[2Jcats", "\\x1b[2Jcats"),
        ("a\rb", "a\\rb"),
        ("a\nb", "a\\nb"),
        ("a\u2028b", "a\\u2028b"),
        ("\x85", "\\x85"),
    ],
)
def test_name_cannot_clear_the_screen_or_forge_a_line(refused: Refused, name: str, shown: str) -> None:
    said = refused(2, "recipes", name)
    assert said == f"resnet-dist recipes: error: there is no recipe '{shown}'\n"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("3", 0)])
def test_only_the_main_process_prints(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert main(["recipes", "nope"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        ("> /dev/full", 4, "standard output: cannot be written (No space left on device)"),
        (">&-", 0, ""),
        ("2> /dev/full", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| head -c 1 > /dev/null", 0, ""),
    ],
)
def test_streams_may_be_full_or_closed(redirect: str, code: int, said: str) -> None:
    """A verb that prints; and one that refuses keeps its exit code, whether or not it can say why."""
    for arguments, expected in (("recipes", code), ("nothing", 2)):
        line = f"{sys.executable} -m resnet_dist {arguments} {redirect}"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
        assert "Traceback" not in done.stderr and (said in done.stderr or expected == 2)


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    line = [
        sys.executable,
        "-c",
        "from resnet_dist.runtime import streams; streams.prepare(); print('grün', flush=True)",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "gr\\xfcn\n"), done.stderr


def test_recipes_are_listed_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in texts().items():
        first = text.splitlines()[0].removeprefix("# ")
        assert any(re.fullmatch(rf"{name} +{re.escape(first)}", line) for line in lines)


@pytest.mark.parametrize("name", texts())
def test_recipe_is_printed_as_the_file_that_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", name]) == 0
    file = Path(resnet_dist.__file__).parent / "config/recipes" / f"{name}.toml"
    assert capsys.readouterr().out == file.read_text()


def test_unknown_recipe_is_a_usage_error(refused: Refused) -> None:
    assert "did you mean 'discriminative'?" in refused(2, "recipes", "discriminativ")


# Launchers


def words_of_all_verbs() -> set[str]:
    found = {flag for verb in WITH_CONFIG for flag in flags_of(config_of(verb))} | HELP.keys()
    return found | {flag.replace("-", "_").replace("__", "--", 1) for flag in found if flag.startswith("--")}


@pytest.mark.parametrize("make_launcher", [get_args_parser, launch_command_parser], ids=["torchrun", "accelerate"])
@pytest.mark.parametrize("start", [["train.py"], ["-m", "resnet_dist", "train"]])
def test_launchers_leave_our_options_alone(make_launcher: Callable[[], ArgumentParser], start: list[str]) -> None:
    """torchrun reads abbreviations of its options even behind the script: none of ours may be one."""
    launcher = make_launcher()
    words = words_of_all_verbs()
    assert len(words) > 100 and "--batch_size" in words and "--recipe" in words
    lost = []
    for word in sorted(words | {"--debug"}):
        for given in ([word], [word, "5"], [f"{word}=5"], ["photos", word, "5"]):
            try:
                taken = launcher.parse_args([*start, *given]).training_script_args
            except SystemExit:
                taken = None
            if taken != [*start[2:], *given]:
                lost.append((given, taken))
    assert lost == []


# Wording


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 猫", "plain ü 猫"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\udcff", "\\udcff"),
        ("a\tb\u202e", "a\\tb\\u202e"),
    ],
)
def test_printable_text_is_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("a\r\x1b[2J\x85\u2028b", "a\\r\\x1b[2J\\x85\\u2028b"),
        ("grün 蓝 \u00a0 \U0001f469\u200d\U0001f680 \udcff", "grün 蓝 \u00a0 \U0001f469\u200d\U0001f680 \udcff"),
    ],
)
def test_one_line_is_one_line_and_leaves_letters_alone(name: str, shown: str) -> None:
    assert one_line(name) == shown
    assert len(shown.splitlines()) == 1


def test_names_are_listed_up_to_a_number() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(list("abcdefg"), most=2) == "'a', 'b' and 5 more"


@pytest.mark.parametrize(("name", "shown"), [("cat", "cat"), ("a" * 11, "a" * 9 + "…"), ("a\nb", "a b")])
def test_long_names_are_shortened(name: str, shown: str) -> None:
    assert shortened(name, 10) == shown


def test_suggestion_is_near_or_nothing() -> None:
    assert suggestion("cosin", ["step", "cosine"]) == "; did you mean 'cosine'?"
    assert suggestion("xyz", ["step", "cosine"]) == ""


@pytest.mark.parametrize("noun", ["epoch", "image", "validation image", "step", "core", "GPU", "thread"])
def test_counts_have_the_right_plural(noun: str) -> None:
    assert [counted(number, noun) for number in (0, 1, 2)] == [f"0 {noun}s", f"1 {noun}", f"2 {noun}s"]


def test_irregular_plurals() -> None:
    assert [counted(2, noun) for noun in ("class", "process", "batch", "copy", "key")] == [
        "2 classes",
        "2 processes",
        "2 batches",
        "2 copies",
        "2 keys",
    ]
