"""Every error line that the page quotes is one that the program can print."""

import ast
import re
from collections.abc import Iterator

from tests.docs.markdown import DOCS, ROOT

QUOTED = re.findall(r"^`error: (.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def texts() -> Iterator[str]:
    """Every text in the source, with `...` for what is filled in."""
    for package in ("resnet_dist", "export"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_quoted_lines_are_in_the_source() -> None:
    source = "\n".join(texts())
    assert len(QUOTED) > 20
    missing = {line: part for line in QUOTED for part in re.split(r"\s*\.\.\.\s*", line) if part not in source}
    assert missing == {}
