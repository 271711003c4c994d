"""The page to try the model in a browser. Its script and style are inside it, and it loads nothing else."""

import base64
import functools
import hashlib
import re
from importlib import resources


@functools.cache
def page() -> str:
    """The page."""
    return resources.files("export.serve").joinpath("page.html").read_text(encoding="utf-8")


@functools.cache
def policy(text: str) -> str:
    """A Content-Security-Policy that allows only the script and style of this page, and requests to its own server."""
    hashes = {name: _hash(re.search(f"<{name}>(.*)</{name}>", text, re.DOTALL)) for name in ("script", "style")}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(part: "re.Match[str] | None") -> str:
    assert part is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(part[1].encode()).digest()).decode()}'"
