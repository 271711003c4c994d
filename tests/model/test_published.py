"""What is said of weights: equal to timm's transforms, torchvision's entries, and files from a server."""

import dataclasses
import json
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.models import save_for_hf

from export.predict import Preprocessing, fit, normalise
from resnet_dist.cli.main import main
from resnet_dist.config.schema import ARCHITECTURES, ModelConfig
from resnet_dist.errors import ArtifactError, MachineError
from resnet_dist.files.weights_file import located
from resnet_dist.model import published
from resnet_dist.model.checkpoint import load_checkpoint
from resnet_dist.model.published import Published, of_settings, of_source, of_timm, of_torchvision
from resnet_dist.model.weights import preprocessing_of
from tests.conftest import TINY, make_folder

ALL_WEIGHTS = [w for name in ARCHITECTURES for w in torchvision.models.get_model_weights(name)]
TAGS = [tag for name in ARCHITECTURES for tag in timm.list_pretrained(f"{name}.*")]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def timm_folder(folder: Path, name: str = "resnet18", **changes: Any) -> Path:
    """A folder as timm writes it: a network with random weights and the configuration of its tag, with changes."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay={"mean": MEAN, "std": STD, **changes})
    save_for_hf(model, folder, model_config={"label_names": ["ant", "bee", "cat"]}, safe_serialization=True)
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        (config if name in ("architecture", "model_args") else config["pretrained_cfg"])[name] = value
    file.write_text(json.dumps(config))
    return file


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm network for 32 pixels; not to be changed by a test."""
    return timm_folder(tmp_path_factory.mktemp("timm"), input_size=(3, 32, 32))


# timm


@pytest.mark.parametrize("tag", TAGS)
def test_preprocessing_of_every_tag_is_timms_transform(tag: str, tmp_path: Path) -> None:
    """From the config.json alone, pixel for pixel."""
    cfg = timm.models.get_pretrained_cfg(tag)
    config = {"architecture": cfg.architecture, "num_classes": 1000, "pretrained_cfg": cfg.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = of_timm(tmp_path / "config.json")
    x, y = np.meshgrid(np.linspace(0, 255, 311), np.linspace(0, 255, 269))
    image = Image.fromarray(np.stack([x, y, (x * y) % 256], axis=-1).astype(np.uint8))
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict()))(image)
    assert said.preprocessing is not None
    ours = normalise(fit(image, said.preprocessing), said.preprocessing)
    torch.testing.assert_close(torch.from_numpy(ours).permute(2, 0, 1), theirs, rtol=0, atol=1e-6)
    assert (said.model, said.license, said.base_model) == (cfg.architecture, cfg.license, cfg.hf_hub_id)


def test_folder_of_timm_names_its_classes(hub_folder: Path) -> None:
    said = of_source(str(hub_folder))
    assert said.classes == ("ant", "bee", "cat") and said.by == str(hub_folder / "config.json")
    assert said == of_source(str(hub_folder / "model.safetensors"))
    assert said.preprocessing == Preprocessing(
        img_size=32, resize=33, interpolation="bicubic", mean=MEAN, std=STD, fill=(128, 102, 76)
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architecture": "resnet50d"}, "cannot build resnet50d; the architecture must be in resnet18, "),
        ({"model_args": {"global_pool": "max"}}, "cannot build a resnet18 with global_pool 'max'"),
        ({"model_args": [1]}, "model_args must be a JSON object"),
        ({"model_args": {"num_classes": 3, "act_layer": "silu"}}, "cannot build a resnet18 with act_layer 'silu'"),
        ({"input_size": [1, 32, 32]}, "input_size must be 3 channels of a square"),
        ({"input_size": [3, 32, 48]}, "input_size must be 3 channels of a square"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' is not supported"),
        ({"crop_mode": "squash"}, "crop_pct must be 1 with crop_mode squash"),
        ({"crop_pct": 0}, "its pretrained_cfg cannot be used"),
        ({"crop_pct": None}, "its pretrained_cfg cannot be used"),
        ({"mean": [1]}, "its pretrained_cfg cannot be used"),
        ({"std": [0, 1, 1]}, "its pretrained_cfg cannot be used"),
    ],
)
def test_config_that_cannot_be_used_gives_one_line(
    hub_folder: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    shutil.copy(hub_folder / "config.json", tmp_path)
    file = change_config(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=r"^[^\n]+$") as raised:
        of_timm(file)
    assert problem in str(raised.value) and str(file) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}'])
def test_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json: "):
        of_timm(tmp_path / "config.json")


def test_licence_that_is_not_stated_is_none(hub_folder: Path, tmp_path: Path) -> None:
    for value in (None, "", "unknown"):
        shutil.copy(hub_folder / "config.json", tmp_path)
        assert of_timm(change_config(tmp_path, license=value)).license is None
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    assert of_timm(tmp_path / "config.json") == Published(), "the configuration of another library"


# torchvision


@pytest.mark.parametrize("weights", ALL_WEIGHTS, ids=str)
def test_torchvisions_weights_are_described_by_their_entry(weights: Any) -> None:
    """timm has the same file under the name that is given as base model."""
    said = of_torchvision(weights)
    assert said.model is not None and weights in set(torchvision.models.get_model_weights(said.model))
    assert said.classes == tuple(weights.meta["categories"]) and len(said.classes) == len(set(said.classes)) == 1000
    assert said.preprocessing == preprocessing_of(weights) and said.license is None
    theirs = timm.models.get_pretrained_cfg(str(said.base_model).removeprefix("timm/"))
    assert (theirs.url, theirs.hf_hub_id) == (weights.url, said.base_model)


def test_file_of_torchvision_is_recognised_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "renamed.pth").write_bytes(b"")
    monkeypatch.setattr(published, "sha256_of", lambda _: "0676ba61" + 56 * "0")  # of resnet50-0676ba61.pth
    said = of_source(str(tmp_path / "renamed.pth"))
    assert said == of_torchvision(torchvision.models.ResNet50_Weights.IMAGENET1K_V1)
    assert of_settings(ModelConfig(model="resnet50", weights="IMAGENET1K_V1")) == said
    monkeypatch.setattr(published, "sha256_of", lambda _: 64 * "0")
    assert of_source(str(tmp_path / "renamed.pth")) == of_settings(ModelConfig(weights="none")) == Published()


# Training from a folder


def test_training_takes_preprocessing_and_licence_of_a_hub_folder(
    hub_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are shown in the plan and stored, and a resumed run does not need the folder."""
    folder, data, run = tmp_path / "timm", make_folder(tmp_path / "images", train=4, val=1), tmp_path / "run"
    shutil.copytree(hub_folder, folder)
    options = ["--model", "resnet18", "--workers", "0", "--threads", "1", "--mixed-precision", "no", "--no-report"]
    command = ["train", str(data), *options, "--weights", str(folder), "--epochs", "1", "--batch-size", "12"]
    assert main([*command, "-o", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "preprocessing: crop 33 px cropped to 32, bicubic, mean 0.5 0.4 0.3, std 0.2 0.3 0.25 (from " in shown
    spec = of_source(str(folder)).preprocessing
    assert load_checkpoint(run / "checkpoints/best.safetensors")[1].preprocessing == spec
    assert json.loads((run / "run.json").read_text())["weights"] == {"license": "apache-2.0"}
    shutil.rmtree(folder)
    assert main(["train", "--resume", str(run), "--epochs", "2", "--dry-run"]) == 0
    stored = tomllib.loads((run / "config.toml").read_text())["preprocess"]
    assert stored == {"img_size": 32, "resize": 33, "resize_mode": "crop", "interpolation": "bicubic"} | {
        "mean": list(MEAN),
        "std": list(STD),
    }


def test_plan_says_if_preprocessing_is_assumed_or_changed(
    hub_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = make_folder(tmp_path / "images", val=4), tmp_path / "w.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    options = ["train", str(data), *TINY, "--stem", "standard", "--dry-run", "--weights"]
    assert main([*options, str(file)]) == 0
    assert f"(assumed: {file} does not say how its images were prepared)" in capsys.readouterr().out
    assert main([*options, str(hub_folder)]) == 0
    assert ", changed by the settings)" in capsys.readouterr().out


# The Hub


@pytest.fixture
def hub_server(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server with the folder as the repository timm/resnet18.made_up, and the requests that it got."""
    place = tmp_path / "served/timm/resnet18.made_up/resolve/main"
    shutil.copytree(hub_folder, place)
    requests: list[str] = []

    class Files(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
            self.send_header("X-Repo-Commit", 40 * "a")
            super().end_headers()

        def log_request(self, *_: object) -> None:
            requests.append(f"{self.command} {self.path}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_repository_is_downloaded_once(hub_server: list[str], hub_folder: Path, tmp_path: Path) -> None:
    file = located("hf://timm/resnet18.made_up")
    assert file.read_bytes() == (hub_folder / "model.safetensors").read_bytes()
    files = [request for request in hub_server if request.startswith("GET") and "/resolve/main/" in request]
    assert [request.rpartition("/")[2] for request in files] == ["config.json", "model.safetensors"]
    hub_server.clear()
    said = of_source("hf://timm/resnet18.made_up")
    assert hub_server == [], "the cache answers"
    local = dataclasses.replace(of_source(str(hub_folder)), base_model="timm/resnet18.made_up", by=said.by)
    assert said == local


def test_failed_download_gives_one_line(
    hub_server: list[str], tmp_path: Path, refused: Callable[..., str], folder: Path
) -> None:
    for name in ("timm/absent", "a/b/c"):
        with pytest.raises(MachineError, match=r"^[^\n]+$") as raised:
            located(f"hf://{name}")
        assert f"cannot download hf://{name} (" in str(raised.value) and "give their folder" in str(raised.value)
    assert "--output-dir is missing" in refused(2, "export", "hf://timm/absent")
    said = refused(4, "eval", "hf://timm/absent", folder, "--no-save")
    assert "cannot download hf://timm/absent" in said and len(said.splitlines()) == 1
