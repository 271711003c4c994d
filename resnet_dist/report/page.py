"""`report.html`: a single file with its pictures, numbers and script. It loads nothing else."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.data.check import Finding, report_on, summary
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.files.run import write_atomically
from resnet_dist.report.on_disk import RunRecord
from resnet_dist.report.page_content import evaluation_content
from resnet_dist.runtime.wording import counted, printable

if TYPE_CHECKING:
    from resnet_dist.evaluation.evidence import Evidence

SCRIPTS = ("dom.js", "charts.js", "matrix.js", "gallery.js", "page.js")  # concatenated in this order


def write_evaluation_page(file: Path, evaluation: Evaluation, evidence: "Mapping[int, Evidence]") -> None:
    """Write the page of an evaluation. `evidence`: Grad-CAM maps by position. Raises MachineError."""
    title = f"{file.absolute().parent.name}: {counted(len(evaluation), 'image')}"
    write_page(file, title, evaluation_content(evaluation, None, None, overlays_of(evidence)))


def write_run_page(
    run: RunRecord,
    evaluation: Evaluation,
    evidence: "Mapping[int, Evidence]",
    findings: Sequence[Finding] | None,
) -> Path:
    """Write `report.html` of a run about its validation images. `findings`: the results of `check` for all images.

    Raises ArtifactError, UsageError, MachineError.
    """
    file = run.path / "report.html"
    data = summary(report_on(findings), evaluation.spec) if findings is not None else None
    write_page(file, run.path.absolute().name, evaluation_content(evaluation, run, data, overlays_of(evidence)))
    return file


def overlays_of(evidence: "Mapping[int, Evidence]") -> dict[int, str]:
    """Saliency overlays as `data:` URLs by position."""
    if not evidence:
        return {}
    from resnet_dist.report.overlays import overlay_address  # it imports matplotlib, which takes a second

    return {position: overlay_address(one.image, one.heat) for position, one in evidence.items()}


def write_page(file: Path, title: str, content: Mapping[str, Any]) -> None:
    """Write the page that shows `content` (see `page_content`), plain JSON values. Raises MachineError."""
    style, script = _part("page.css"), "".join(map(_part, SCRIPTS))
    parts = {
        "POLICY": policy(style, script),
        "TITLE": html.escape(printable(title)),
        "STYLE": style,
        "SCRIPT": script,
        "CONTENT": script_json(content),
    }
    # One substitution for all names, because the inserted text may itself contain them.
    write_atomically(file, re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], _part("page.html")))


def policy(style: str, script: str) -> str:
    """A Content-Security-Policy that allows only this style and this script, and loads nothing."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def script_json(content: Mapping[str, Any]) -> str:
    """JSON for a script element, escaped so that no class or file name can close the element or open another."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _part(name: str) -> str:
    return (resources.files("resnet_dist.report") / "html" / name).read_text(encoding="utf-8")
