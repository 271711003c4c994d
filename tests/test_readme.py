"""The commands of the README are understood, and its Python snippets run, with few small images as photographs.

tests/docs/test_session.py runs the commands.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from resnet_dist.cli import main as cli
from resnet_dist.cli.parser import parse
from resnet_dist.config import recipes
from tests.conftest import make_folder, write_image

README = Path(__file__).parents[1] / "README.md"
QUICK_PYTHON = {  # what makes the first snippet take seconds
    'model="resnet50"': 'model="resnet18", weights="none", img_size=32, threads=1',
    "epochs=10": "epochs=2",
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def commands() -> list[list[str]]:
    """Every `resnet-dist ...` line of a block without a language, in order, comments and output left out."""
    lines = [line.removeprefix("$ ") for block in blocks("") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("resnet-dist ")]
    return [line[1:] for line in words]


def test_readme_has_commands_for_every_verb() -> None:
    named = {line[0] for line in commands()} | set(re.findall(r"resnet-dist ([a-z-]+)", README.read_text()))
    assert len(commands()) > 10
    assert {verb.split()[0] for verb in cli.VERBS} <= named


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)", README.read_text())
    assert len(links) > 20
    assert [link for link in links if not (README.parent / link).is_file()] == []


def test_recipe_table_has_the_description_of_every_recipe() -> None:
    """The first comment of each file, which `resnet-dist recipes` shows."""
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \|$", README.read_text(), re.MULTILINE))
    folder = Path(recipes.__file__).parent
    wanted = {file.stem: file.read_text().partition("\n")[0].removeprefix("# ") for file in folder.glob("*.toml")}
    assert rows == wanted


@pytest.mark.parametrize("line", commands(), ids=" ".join)
def test_every_command_is_understood(line: list[str]) -> None:
    if line[0] == "predict" or "--resume" in line:
        pytest.skip("needs what other commands make: tests/docs/test_session.py runs it")
    module = importlib.import_module(cli.module_of(line[0]))
    parse(module.Config, line[1:], "resnet-dist")


@pytest.mark.matrix
def test_python_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one folder and one namespace."""
    monkeypatch.chdir(tmp_path)
    make_folder(Path("photos"), train=40, val=0)
    for name in ("cat.jpg", "dog.jpg"):
        write_image(Path(name), seed=0)
    first, *others = blocks("python")
    for original, quick in QUICK_PYTHON.items():
        assert original in first
        first = first.replace(original, quick)
    namespace: dict[str, object] = {}
    for snippet in (first, *others):
        exec(snippet, namespace)
    assert re.search(r"\n0\.\d+, 95 % interval 0\.\d+ to [01]\.\d+\ncat\.jpg ", capsys.readouterr().out)
