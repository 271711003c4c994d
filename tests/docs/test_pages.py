"""Every command of every page is understood by the program that it starts, and every Python block by the package."""

import ast
import functools
import importlib
import inspect
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import resnet_dist as rd
from export import predict
from resnet_dist.cli import spellings
from resnet_dist.cli.main import VERBS, module_of
from resnet_dist.cli.parser import flags_of, read
from tests.docs.markdown import ALL, DOCS, PAGES, ROOT, Command, blocks

OTHER_OPTIONS = {"--debug", "--help", "--help-all"}  # of all commands
OTHER_OPTIONS |= {"--shm-size", "--build-arg", "--gpus", "--model-repository"}  # of containers and of Triton
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def understood(words: Sequence[str]) -> None:
    """Fail unless the program that these words start knows every option."""
    first, *rest = words
    if first == "resnet-dist":
        verb_understood(rest)
    elif first == "accelerate":
        assert rest[0] == "launch"
        arguments = launch_command_parser().parse_args(rest[1:])
        assert arguments.config_file is None or (ROOT / arguments.config_file).is_file()
        assert arguments.training_script == "resnet_dist" and arguments.module
        verb_understood(arguments.training_script_args)
    elif first == "torchrun":
        arguments = get_args_parser().parse_args(rest)
        assert arguments.training_script == "resnet_dist" and arguments.module
        verb_understood(arguments.training_script_args)
    elif first == "python" and rest[0] == "launch/exit_code.py":
        understood(rest[2:])
    elif first == "python" and rest[0] == "predict.py":  # the copy in an export
        predict.parser_for("predict.py").parse_intermixed_args(rest[1:])
    elif first == "python" and rest[:2] == ["-m", "build"]:
        assert "build" in " ".join(EXTRAS["test"])
    elif first in ("python", "bash"):
        assert (ROOT / rest[0]).is_file()
    elif first == "sbatch":
        place = next(number for number, word in enumerate(rest) if word.startswith("launch/"))
        assert (ROOT / rest[place]).is_file()
        verb_understood(["train", *rest[place + 1 :]])
    else:
        other_understood(first, rest)


def other_understood(first: str, rest: Sequence[str]) -> None:
    """The few other programs: pip with our extras, kubectl and docker with our files, mkdocs."""
    if first == "docker":
        assert rest[0] == "run" or (ROOT / rest[rest.index("-f") + 1]).is_file()
    elif first == "kubectl":
        files = [word.rpartition("=")[2] for word in rest if "launch/" in word]
        assert files and all((ROOT / file).is_file() for file in files)
    elif first == "pip":
        extras = re.findall(r"resnet-dist\[(\w+)\]|\.\[(\w+)\]", " ".join(rest))
        assert rest[0] == "install" and all((one or other) in EXTRAS for one, other in extras)
    else:
        assert first in ("mkdocs", "git", "npm", "curl", "uvicorn"), f"unknown program {first}"


def verb_understood(words: Sequence[str]) -> None:
    """Fail unless `resnet-dist` knows the verb and its options."""
    verb = next(name for name in (" ".join(words[:2]), words[0]) if name in VERBS)
    arguments = list(words[len(verb.split()) :])
    if {"--help", "--help-all"} & set(arguments):
        return
    if verb == "predict":
        predict.parser_for("resnet-dist predict").parse_intermixed_args(arguments)
        return
    typed = read(importlib.import_module(module_of(verb)).Config, arguments)
    assert typed.problems == [] and typed.notes == []


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_is_understood(command: Command) -> None:
    understood(command.words)


def test_every_verb_is_shown_in_the_pages() -> None:
    shown = {" ".join(command.words[1:3]) for command in ALL} | {command.words[1] for command in ALL}
    assert set(VERBS) - shown == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_blocks_use_names_and_keywords_that_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rd":
                assert node.attr in rd.__all__, node.attr
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("rd."):
                check_keywords(node)


def check_keywords(call: ast.Call) -> None:
    """Fail if a call of the package has a keyword that the function does not take."""
    parameters = inspect.signature(getattr(rd, ast.unparse(call.func).removeprefix("rd."))).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        assert {keyword.arg for keyword in call.keywords} <= set(parameters)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_options_in_the_text_exist(page: Path) -> None:
    """An option in code font, such as `--lr`, belongs to one of our commands, to a launcher, or to another tool."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", text)
    named = {word.replace("_", "-") for span in spans for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert named - known_options() == set()


@functools.cache
def known_options() -> frozenset[str]:
    """The options of all verbs and launchers, and those of other tools that get a hint."""
    ours = {
        flag
        for verb in VERBS
        if verb != "predict"
        for flag in flags_of(importlib.import_module(module_of(verb)).Config)
    }
    parsers = (predict.parser_for("predict"), launch_command_parser(), get_args_parser())
    theirs = {flag.replace("_", "-") for parser in parsers for flag in parser._option_string_actions}
    return frozenset(ours | theirs | set(spellings.OPTIONS) | OTHER_OPTIONS)
