"""The whole flow in a notebook, with two processes by `accelerate.notebook_launcher` too."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = [
    """
import resnet_dist as rd
small = dict(model="resnet18", weights="none", stem="small", img_size=16, workers=0, threads=1, mixed_precision="no",
             epochs=1, global_batch_size=8)
run = rd.train(DATA, **small, output_dir="runs/one")
run
""",
    """
evaluation = rd.evaluate(run, workers=0, threads=1, save=False)
assert evaluation.metrics["top1"].value == run.metrics["top1"].value
evaluation
""",
    """
bundle = rd.export(run, images=4)
bundle
""",
    """
from pathlib import Path
files = sorted(Path(DATA, "val").rglob("*.png"))
predictions = rd.predict(bundle.model, files, top_k=1)
assert len(predictions) == len(files) and not any(p.error for p in predictions)
""",
    """
from accelerate import notebook_launcher

def work():
    run = rd.train(DATA, **small, output_dir="runs/two")
    assert rd.evaluate(run, workers=0, threads=1, save=False).metrics["top1"].value == run.metrics["top1"].value

notebook_launcher(work, num_processes=2, use_port=PORT)
two = rd.load_run("runs/two")
assert two.facts["launches"][-1]["processes"] == 2
two
""",
    """
for one, other in zip(run.epochs, two.epochs, strict=True):
    assert abs(one["train_loss"] / other["train_loss"] - 1) < 0.2
""",
]


@pytest.mark.matrix
def test_the_whole_flow_in_a_notebook(folder: Path, tmp_path: Path, notebook_kernel: str) -> None:
    cells = [f"DATA, PORT = {str(folder)!r}, '29653'", *CELLS]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    place = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=600, kernel_name=notebook_kernel, resources=place)
    client.execute()
    shown = [[str(o.get("data", {}).get("text/html", "")) for o in cell.outputs] for cell in notebook.cells]
    for number in (1, 2, 3, 5):
        assert any("<table" in text for text in shown[number]), (number, notebook.cells[number].outputs)
    printed = [o for number in (1, 2, 3) for o in notebook.cells[number].outputs if o.get("name") == "stdout"]
    assert printed == []
