"""The commands and the Python snippets of the README run, with few small images in place of photographs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torchvision
from safetensors.torch import save_file

from resnet_dist.cli import main as cli
from resnet_dist.cli.main import main
from resnet_dist.cli.parser import parse
from resnet_dist.config import recipes
from tests.conftest import make_folder, write_image

README = Path(__file__).parents[1] / "README.md"
QUICK = ["--model", "resnet18", "--img-size", "32", "--epochs", "2", "--threads", "1"]
QUICK += ["--weights", "resnet18.safetensors"]
QUICK_PYTHON = {  # what makes the first snippet take seconds
    'model="resnet50"': 'model="resnet18", weights="none", img_size=32, threads=1',
    "epochs=10": "epochs=2",
}
TRAINS = ("train", "lr-find", "compare", "bench")


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
        pytest.skip("needs what other commands make: the test below runs it")
    module = importlib.import_module(cli.module_of(line[0]))
    parse(module.Config, line[1:], "resnet-dist")


@pytest.mark.matrix
def test_the_session_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, in one folder: later commands use what earlier ones made."""
    monkeypatch.chdir(tmp_path)
    make_folder(Path("photos"), train=80, val=0)
    make_folder(Path("new_photos"), train=2, val=0, classes=["unsorted"])
    session = [line for line in commands() if any("photos" in word for word in line)]
    assert len(session) >= 8
    save_file(torchvision.models.resnet18().state_dict(), "resnet18.safetensors")  # in place of a download
    for line in session:
        quick = QUICK if line[0] in TRAINS and "--resume" not in line else []
        if line[0] == "lr-find":
            quick = [*QUICK, "--steps", "20"]
        if line[0] == "bench":  # of speed alone
            quick = [*QUICK[:-1], "none", "--regimes", "full", "--windows", "1", "--window-steps", "1"]
        if "--int8" in line:  # of a network that has learned next to nothing, whose classes are nearly tied
            quick = ["--min-agreement", "50"]
        assert main([*line, *quick]) == 0, (line, capsys.readouterr().err)
    assert Path("runs/photos/report.html").exists() and Path("runs/photos/export/model.onnx").exists()


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
