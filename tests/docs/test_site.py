"""The site: it builds without a warning, loads nothing from elsewhere, and its generated parts are complete."""

import html
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from resnet_dist.cli import spellings
from resnet_dist.cli.main import VERBS, module_of
from resnet_dist.config import recipes
from resnet_dist.config.layers import options_of
from tests.conftest import made_once
from tests.docs.markdown import DOCS, PAGES, ROOT

# An address that a browser loads by itself: not that of a link.
LOADS = re.compile(
    r"""(?:<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=|<link\b[^>]*?\bhref=|url\(|@import\s+)["']?"""
    r"""((?:https?:)?//[^"'\s)>]+)""",
    re.IGNORECASE,
)


def build(site: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "site", build)


def text_of(page: Path) -> str:
    """The text that a page shows, in one line."""
    shown = re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", shown)).split())


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    files = [file for file in site.rglob("*") if file.suffix in (".html", ".css")]
    found = {(file.name, address) for file in files for address in LOADS.findall(file.read_text())}
    assert len(files) > 20 and found == set()
    assert LOADS.search('<link rel="stylesheet" href="https://fonts.example/x.css">')


def test_every_verb_and_option_is_in_the_reference(site: Path) -> None:
    for verb in VERBS:
        shown = text_of(site / "reference" / f"{verb.replace(' ', '-')}.html")
        if verb != "predict":
            options = [o for o in options_of(importlib.import_module(module_of(verb)).Config) if not o.positional]
            assert [o.flag for o in options if o.flag not in shown] == []
            assert [o.name for o in options if " ".join(o.help.split())[:30] not in shown] == []
        assert VERBS[verb] in text_of(site / "reference" / "index.html")


def test_every_recipe_and_result_is_shown(site: Path) -> None:
    shown = text_of(site / "reference" / "recipe-files.html")
    assert all(" ".join(text.split()) in shown for text in recipes.texts().values())
    measured = text_of(site / "benchmarks.html")
    assert all(file.name in measured for file in (ROOT / "benchmarks/results").glob("*.json"))
    rounds = json.loads((ROOT / "benchmarks/results/peers-head.json").read_text())["jobs"]["head"]["resnet-dist"]
    assert f"{rounds[0]['wall_seconds']:.1f}" in measured


def test_every_page_is_in_the_index_for_language_models(site: Path) -> None:
    index = (site / "llms.txt").read_text()
    addresses = set(re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S", index, re.MULTILINE))
    pages = {str(file.relative_to(site)) for file in site.rglob("*.html")} - {"404.html"}
    assert addresses == pages
    assert len(pages) == len(PAGES) + len(VERBS)
    assert [page for page in pages if "description:" in text_of(site / page)] == []


def test_pages_that_are_written_by_hand_are_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {str(page.relative_to(DOCS)) for page in PAGES} <= named
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False


def test_hints_for_other_tools_are_all_shown(site: Path) -> None:
    shown = text_of(site / "how-to" / "coming-from.html")
    assert [typed for typed in spellings.OPTIONS if typed not in shown] == []
