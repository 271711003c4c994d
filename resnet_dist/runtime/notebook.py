"""HTML tables of results, for notebooks."""

import html
from collections.abc import Sequence

from resnet_dist.runtime.wording import printable


def html_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A two-column HTML table with a title. All texts are escaped."""
    lines = [
        f"<tr><th style='text-align:left'>{_escaped(name)}</th><td style='text-align:left'>{_escaped(value)}</td></tr>"
        for name, value in rows
    ]
    return f"<table><caption style='text-align:left'>{_escaped(title)}</caption>{''.join(lines)}</table>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))
