"""The notebooks of the tutorials: they run from start to end, and are stored with the outputs of such a run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.markdown import DOCS

NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
IDS = [file.stem for file in NOTEBOOKS]
# What makes a notebook take a third of the time: the test is of the code, not of the accuracy.
SHORTER = {r"epochs=[3-9]": "epochs=1", r"seeds=2": "seeds=1", r"batch_size(=|\": )16": r"batch_size\g<1>32"}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=IDS)
def test_it_is_stored_as_it_ran(file: Path) -> None:
    """In order, with text outputs only, and without a path of the machine that ran it."""
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    assert {kind for output in outputs for kind in output.get("data", {})} <= {"text/plain"}
    assert not any(name in file.read_text() for name in ("/root", "/home", "/tmp", "site-packages"))


def test_every_tutorial_has_one_and_names_it() -> None:
    pages = sorted((DOCS / "tutorials").glob("*.md"))
    assert [page.stem for page in pages] == IDS
    assert all(f"({page.stem}.ipynb)" in page.read_text() for page in pages)


@pytest.mark.matrix
@pytest.mark.parametrize("file", NOTEBOOKS, ids=IDS)
def test_it_runs(file: Path, tmp_path: Path, notebook_kernel: str) -> None:
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = re.sub(long, short, cell.source)
    place = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=600, kernel_name=notebook_kernel, resources=place)
    client.execute()
