"""The model card and the Hub folder: their code runs, timm reads them, and an upload arrives."""

import base64
import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from export.predict import Preprocessing, decode, fit, normalise
from resnet_dist.cli.main import main
from resnet_dist.model.checkpoint import load_checkpoint, save_best
from resnet_dist.model.weights import sha256_of
from resnet_dist.report import hub_folder
from resnet_dist.report.card import plain_text
from resnet_dist.report.hub_folder import crop_share, timm_config
from tests.conftest import CLASSES, TINY, make_folder

Refused = Callable[..., str]
LICENSE = ["--license", "mit"]
SHORT = [*TINY, "--epochs", "1", "--batch-size", "12", "--lr", "0.02", "--recipe", "bn-only"]


def trained(path: Path, *options: str) -> Path:
    data = make_folder(path / "images", val=4, classes=(*CLASSES[:2], "$x|[y](http://z)"))
    assert main(["train", str(data), *SHORT, *options, "-o", str(path / "run")]) == 0
    return path / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a plain network; not to be changed by a test."""
    return trained(tmp_path_factory.mktemp("plain"), "--stem", "standard", "--img-size", "32", "--resize", "37")


@pytest.fixture(scope="module")
def hub(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "folder"
    assert main(["hub", str(run), "-o", str(folder), *LICENSE]) == 0
    photo(folder / "photo.jpg")
    return folder


def photo(file: Path) -> None:
    """A picture that is not square, with gradients so that resizing matters."""
    x, y = np.meshgrid(np.linspace(0, 255, 81), np.linspace(0, 255, 57))
    Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8)).save(file)


def inputs_of(file: Path, spec: Preprocessing) -> torch.Tensor:
    return torch.from_numpy(normalise(fit(decode(file), spec), spec)).permute(2, 0, 1)[None]


def code_in(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)


def test_code_in_model_cards_runs(run: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, run in the folder of the card, gives the class and probability of our own model."""
    model, description = load_checkpoint(run / "checkpoints/best.safetensors")
    with torch.inference_mode():
        wanted = model(inputs_of(hub / "photo.jpg", description.preprocessing)).softmax(1)[0]
    photo(run / "photo.jpg")
    blocks = [(run, code) for code in code_in(run / "README.md")] + [(hub, code) for code in code_in(hub / "README.md")]
    assert len(blocks) == 2 + 4
    for folder, code in blocks:
        if "transformers" in code:  # slow to import; tests/report/test_hub_clients.py runs it
            continue
        monkeypatch.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code, {})
        name, _, probability = said.getvalue().strip().rpartition(" ")
        assert name in (str(int(wanted.argmax())), description.classes[int(wanted.argmax())])
        assert float(probability) == pytest.approx(float(wanted.max()), abs=1e-5)


def test_card_has_the_measured_numbers(run: Path) -> None:
    card = (run / "README.md").read_text()
    metrics = json.loads((run / "eval/val/metrics.json").read_text())
    low, high = metrics["intervals"]["top1"]
    assert f"| top-1 accuracy | {metrics['top1']:.4f} | {low:.4f} to {high:.4f} |" in card
    assert "On 12 validation images" in card and "24 train, 12 val images" in card
    assert "top-5" not in card, "of three classes the target is always among the best five"
    assert str(run.parent) not in card, "no path of this machine"
    assert "[y](http" not in card, "a class is not a link"


@pytest.mark.parametrize("name", ["a|b", "[x](http://y)", "# title", "<script>", "`code`", "a\nb", "\x1b[2J", "$x$"])
def test_names_in_cards_are_escaped(name: str) -> None:
    shown = plain_text(name)
    assert "\n" not in shown and shown.isprintable()
    assert not re.search(r"(?<!\\)(\\\\)*[|\[\]()#<>`$*_]", shown)


def test_timm_gives_the_same_logits(run: Path, hub: Path) -> None:
    ours, description = load_checkpoint(run / "checkpoints/best.safetensors")
    theirs = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    batch = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(batch), ours(batch), rtol=0, atol=1e-6)
    assert tuple(theirs.pretrained_cfg["label_names"]) == description.classes
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    with Image.open(hub / "photo.jpg") as image:
        torch.testing.assert_close(transform(image)[None], inputs_of(hub / "photo.jpg", description.preprocessing))


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_timm_preprocesses_images_equally(run: Path, tmp_path: Path, mode: str, interpolation: str) -> None:
    """In every mode of ours, from config.json alone; rounding may move a padded border by a pixel."""
    _, description = load_checkpoint(run / "checkpoints/best.safetensors")
    resize = 73 if mode == "crop" else 64
    spec = Preprocessing(img_size=64, resize=resize, resize_mode=mode, interpolation=interpolation)
    config = timm_config(dataclasses.replace(description, preprocessing=spec), "mit")
    photo(tmp_path / "photo.jpg")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"]))
    with Image.open(tmp_path / "photo.jpg") as image:
        theirs = transform(image)
    ours = inputs_of(tmp_path / "photo.jpg", spec)[0]
    if mode == "pad":
        assert (theirs - ours).abs().mean() < 0.05
    else:
        torch.testing.assert_close(theirs, ours)


def test_crop_pct_gives_timm_the_same_resize() -> None:
    for img_size in range(8, 400, 3):
        for resize in range(img_size, img_size + 90):
            assert math.floor(img_size / crop_share(img_size, resize)) == resize


def test_hub_folder_holds_the_checkpoint_and_front_matter(run: Path, hub: Path) -> None:
    assert (hub / "model.safetensors").read_bytes() == (run / "checkpoints/best.safetensors").read_bytes()
    start, front, text = (hub / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    metrics = json.loads((run / "eval/val/metrics.json").read_text())
    assert start == "" and text.lstrip().startswith("# ")
    assert fields["library_name"] == "timm" and fields["pipeline_tag"] == "image-classification"
    low, high = metrics["intervals"]["top1"]
    results = fields["model-index"][0]["results"]
    assert results[0]["metrics"][0] == {
        "type": "accuracy",
        "value": metrics["top1"],
        "name": f"top-1 accuracy (95 % interval {low:.4f} to {high:.4f})",
    }
    assert results[0]["dataset"] == {"type": "imagefolder", "name": "validation images"}
    assert fields["license"] == "mit" == json.loads((hub / "config.json").read_text())["pretrained_cfg"]["license"]
    assert "base_model" not in fields and "datasets" not in fields, "random weights, images that are not on the Hub"


def test_card_says_if_timm_cannot_load_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder has no config.json, by which timm would build another network; ours loads it."""
    run = trained(tmp_path, "--head", "mlp", "--head-hidden", "8")
    (run / "hub").mkdir()
    (run / "hub/config.json").write_text("{}")
    shutil.copy(run / "checkpoints/best.safetensors", run / "hub/model.safetensors")
    assert main(["hub", str(run), *LICENSE]) == 0
    assert "timm cannot load it (head mlp and small stem)" in capsys.readouterr().out
    assert sorted(file.name for file in (run / "hub").iterdir()) == ["README.md", "model.safetensors"]
    card = (run / "hub/README.md").read_text()
    assert "timm and torchvision cannot build this network" in card and "timm.create_model" not in card
    model, _ = load_checkpoint(run / "hub/model.safetensors")
    assert not model.training


# The upload, against a small server that answers as the Hub's documentation says


class Hub:
    """What arrived: requests as (path, body), and the answer's status for a new repository."""

    def __init__(self) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.status = 200


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.received.append((self.path, body))
            if self.path.endswith("/api/repos/create"):
                self.answer(hub.status, {"url": f"{address}/you/ants", "name": "you/ants"})
            elif "/preupload/" in self.path:
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
            elif "/commit/" in self.path:
                self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/you/ants/commit/0"})
            else:
                self.answer(200, {"errors": [], "warnings": []})

        def answer(self, status: int, value: dict[str, object]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    address = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    yield hub
    running.shutdown()
    running.server_close()
    thread.join()


def test_upload_is_one_commit_with_the_three_files(
    run: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    assert main(["hub", str(run), "-o", str(folder), *LICENSE]) == 0
    (folder / "secret.txt").write_text("not part of it")
    assert main(["hub", str(run), "-o", str(folder), *LICENSE, "--push-to-hub", "you/ants", "--private"]) == 0
    assert "/you/ants" in capsys.readouterr().out.splitlines()[-1]
    bodies = {path.partition("?")[0]: body for path, body in server.received}
    made = json.loads(bodies["/api/repos/create"])
    assert (made["name"], made["organization"], made["visibility"]) == ("ants", "you", "private")
    lines = [json.loads(line) for line in bodies["/api/models/you/ants/commit/main"].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert files == {name: (folder / name).read_bytes() for name in ("README.md", "config.json", "model.safetensors")}


def test_failed_upload_gives_one_line(run: Path, server: Hub, tmp_path: Path, refused: Refused) -> None:
    server.status = 403
    said = refused(4, "hub", run, "-o", tmp_path / "a", *LICENSE, "--push-to-hub", "you/ants")
    assert said.startswith("resnet-dist hub: error: --push-to-hub you/ants: ") and len(said.splitlines()) == 1
    assert "the folder is written" in said and (tmp_path / "a/model.safetensors").exists()


def test_hub_refuses_wrong_input(run: Path, tmp_path: Path, refused: Refused) -> None:
    assert "must be the name of a repository" in refused(2, "hub", run, "--push-to-hub", "a/b/c d")
    assert "--private needs --push-to-hub" in refused(2, "hub", run, "--private")
    assert "RUN is missing" in refused(2, "hub")
    assert "not a run folder" in refused(2, "hub", tmp_path)
    assert "--license is missing: the initial weights (random weights) state none" in refused(2, "hub", run)
    for wrong in ("unknown", "My Licence"):
        assert f"--license {wrong}: must be a licence" in refused(2, "hub", run, "--license", wrong)
    assert "--base-model a b: must be the name of a repository" in refused(2, "hub", run, "--base-model", "a b")


def test_front_matter_has_what_the_initial_weights_state(run: Path, tmp_path: Path) -> None:
    """run.json knows licence and repository of weights that state them; options come first."""
    copy = shutil.copytree(run, tmp_path / "run")
    facts = json.loads((copy / "run.json").read_text())
    stated = {"license": "cc-by-nc-4.0", "base_model": "timm/resnet18.a1_in1k"}
    (copy / "run.json").write_text(json.dumps({**facts, "weights": stated}))
    for given, expected in (
        ([], stated),
        (["--license", "mit", "--dataset", "you/ants"], {**stated, "license": "mit", "datasets": ["you/ants"]}),
        (["--base-model", "me/mine"], {**stated, "base_model": "me/mine"}),
    ):
        assert main(["hub", str(copy), "-o", str(tmp_path / "folder"), *given]) == 0
        fields = yaml.safe_load((tmp_path / "folder/README.md").read_text().split("---\n")[1])
        assert {name: fields[name] for name in expected} == expected


def test_hub_folder_has_the_export_for_javascript(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it is of the best checkpoint; otherwise a line says what to do."""
    copy, folder = shutil.copytree(run, tmp_path / "run"), tmp_path / "folder"
    command = ["hub", str(copy), "-o", str(folder), *LICENSE]

    def says() -> str:
        capsys.readouterr()
        assert main(command) == 0
        return capsys.readouterr().out

    assert "no onnx/ for transformers.js: the run is not exported" in says()
    assert main(["export", str(copy), "--images", "2", "--threads", "1"]) == 0
    exported = copy / "export/model.onnx"
    assert "onnx/model.onnx, onnx/config.json, onnx/preprocessor_config.json" in says()
    assert (folder / "onnx/model.onnx").read_bytes() == exported.read_bytes()
    assert "@huggingface/transformers" in (folder / "README.md").read_text()
    best = copy / "checkpoints/best.safetensors"
    model, description = load_checkpoint(best)
    save_best(best, model, dataclasses.replace(description, epoch=7))
    assert f"{exported} is of another checkpoint; `resnet-dist export {copy} --overwrite`" in says()
    assert not (folder / "onnx/model.onnx").exists()
    assert "@huggingface/transformers" not in (folder / "README.md").read_text()
    data = exported.read_bytes()
    exported.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    assert main(command) == 6, "a damaged file is not published"


def test_export_that_normalises_is_not_for_javascript(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = sha256_of(run / "checkpoints/best.safetensors")
    metadata = {"checkpoint_sha256": digest, "input": "image"}
    monkeypatch.setattr(hub_folder, "Predictor", lambda *_, **__: SimpleNamespace(metadata=metadata))
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    export, why = hub_folder.exported_model(run)
    assert export is None and "normalises in the graph; `resnet-dist export" in why
