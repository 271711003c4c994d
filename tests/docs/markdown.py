"""The pages of the documentation, their fenced blocks, and the commands in these."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of a page: its words, without variables before it and without a redirection."""

    page: str
    words: tuple[str, ...]
    output: str = ""  # the file after `>`

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [text for _, name, text in FENCE.findall(page.read_text()) if name == language]


def commands(page: Path) -> Iterator[Command]:
    """The commands of the blocks without a language: all lines, or those after `$ ` if a block has such lines."""
    for block in blocks(page, ""):
        lines = block.replace("\\\n", " ").splitlines()
        typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
        for line in typed:
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                before, _, after = " ".join(words).partition(" > ") if ">" in words else ("", "", "")
                kept = words[: words.index(">")] if before else words
                yield Command(str(page.relative_to(DOCS)), tuple(kept), after)


def inline_commands(page: Path) -> Iterator[Command]:
    """The commands with an option that are in code font in the text of a page."""
    text = FENCE.sub("", page.read_text())
    for code in re.findall(r"`(resnet-dist [^`]+)`", text):
        if " --" in code and "COMMAND" not in code:
            yield Command(str(page.relative_to(DOCS)), tuple(shlex.split(code)))


ALL = [command for page in PAGES for command in (*commands(page), *inline_commands(page))]
