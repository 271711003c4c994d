"""Named techniques as data: short commented TOML files in the format of `-c`, shipped in the package."""

import tomllib
from functools import cache
from importlib import resources
from typing import Any


@cache
def texts() -> dict[str, str]:
    """The TOML text of every recipe, by name, sorted."""
    files = {file.name: file for file in resources.files(__name__).iterdir() if file.name.endswith(".toml")}
    names = sorted(name.removesuffix(".toml") for name in files)
    return {name: files[f"{name}.toml"].read_text(encoding="utf-8") for name in names}


@cache
def layers() -> dict[str, dict[str, Any]]:
    """Every recipe as nested dicts, by name."""
    return {name: tomllib.loads(text) for name, text in texts().items()}


def headline(name: str) -> str:
    """The first comment line of a recipe: what it does."""
    return texts()[name].splitlines()[0].lstrip("# ").strip()
