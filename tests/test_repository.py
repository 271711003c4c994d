"""The files around the code agree with it: workflows, hooks, citation, the file tree for contributors."""

import re
from pathlib import Path

import yaml

from resnet_dist import __version__

ROOT = Path(__file__).resolve().parents[1]
LINTERS = ["ruff check", "ruff format --check", "mypy", "codespell"]


def test_hooks_and_lint_script_run_the_same_tools() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].removesuffix(" --force-exclude") for hook in hooks] == LINTERS
    script = (ROOT / ".ci/lint").read_text()
    assert all(re.search(rf"^(git .*xargs -0 )?{linter}( \.)?$", script, re.MULTILINE) for linter in LINTERS)


def test_workflows_run_scripts_of_the_repository() -> None:
    scripts = set()
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            commands = [step["run"] for step in job["steps"] if "run" in step]
            scripts |= {command.split()[1] for command in commands if command.startswith("bash ")}
            assert all(re.match(r"bash \.ci/|pip install |pytest ", command) for command in commands), file
    assert scripts == {".ci/lint", ".ci/wheel", ".ci/run"}
    assert all((ROOT / script).is_file() for script in scripts)


def test_workflows_test_every_supported_python() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert f'requires-python = ">={matrix["python"][0]}"' in (ROOT / "pyproject.toml").read_text()


def test_citation_names_the_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_file_tree_for_contributors_lists_every_folder() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("## Rules")[0]
    listed = set(re.findall(r"^  ([\w.]+)/", tree, re.MULTILINE))
    packages = {file.parent.name for file in (ROOT / "resnet_dist").glob("*/__init__.py")}
    assert listed == packages
    assert set(re.findall(r"^([\w.]+)/", tree, re.MULTILINE)) >= {
        "resnet_dist",
        "export",
        "launch",
        "benchmarks",
        "tests",
    }
