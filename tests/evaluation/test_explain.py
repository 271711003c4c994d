"""Explanations: they equal captum's, follow the object, and depend on what the network has learnt."""

import builtins
import csv
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnet_dist.cli.main import main
from resnet_dist.evaluation.saliency import METHODS, class_activation, explain, grad_cam, scaled
from resnet_dist.report.overlays import overlay

Refused = Callable[..., str]
SIZE, OBJECT = 64, 24
NAMES = ("red", "green", "blue")


def scenes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grey noise with a coloured square: images float32 (n, 3, 64, 64), class of the colour, mask of the square."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, SIZE, SIZE, generator=random).expand(-1, 3, -1, -1).clone() * 0.5
    classes, masks = torch.randint(0, 3, (n,), generator=random), torch.zeros(n, SIZE, SIZE, dtype=torch.bool)
    for row in range(n):
        y, x = torch.randint(0, SIZE - OBJECT, (2,), generator=random).tolist()
        masks[row, y : y + OBJECT, x : x + OBJECT] = True
        images[row, classes[row]] += 2.0 * masks[row]
    return images, classes, masks


def block(width_in: int, width: int, stride: int) -> BasicBlock:
    shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(width_in, width, stride, shortcut)


def narrow_resnet(seed: int) -> nn.Module:
    """A ResNet of torchvision's blocks, 16 to 64 channels wide; layer4 gives 8 x 8 positions."""
    torch.manual_seed(seed)
    parts: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, 16, 3, 2, 1, bias=False), "bn1": nn.BatchNorm2d(16)}
    parts |= {"relu": nn.ReLU(), "layer1": block(16, 16, 1), "layer2": block(16, 32, 2), "layer3": block(32, 64, 2)}
    parts |= {"layer4": block(64, 64, 1), "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts | {"fc": nn.Linear(64, 3)}))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """One that was trained for some seconds to name the colour."""
    torch.set_num_threads(1)  # more threads only wait for each other in so narrow a network
    model = narrow_resnet(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(40):
        images, classes, _ = scenes(16, seed=step)
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, classes, _ = scenes(32, seed=1000)
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == classes).float().mean() > 0.9, "the network was to learn the colours"
    return model


def share_on_object(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp_min(1e-9)


def test_grad_cam_equals_captum(network: nn.Module) -> None:
    images, classes, _ = scenes(4, seed=2000)
    expected = LayerGradCam(network, network.layer4).attribute(images, target=classes, relu_attributions=True)
    assert torch.allclose(class_activation(network, images, classes), expected[:, 0], atol=1e-6)
    found = grad_cam(network, images, classes)
    assert found.shape == (4, SIZE, SIZE) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() == 1 and all(part.grad is None for part in network.parameters())


@pytest.mark.parametrize(("method", "least"), [("gradcam", 2.5), ("occlusion", 2.5), ("integrated-gradients", 2.5)])
def test_the_map_follows_the_object(network: nn.Module, method: str, least: float) -> None:
    """The share of the map on the object, against the share that its area is of the image."""
    images, classes, masks = scenes(6, seed=3000)
    share = share_on_object(explain(method, network, images, classes), masks)
    chance = OBJECT**2 / SIZE**2
    assert share.mean() > least * chance


def test_the_map_changes_when_weights_are_random(network: nn.Module) -> None:
    """The model randomisation test of Adebayo et al. 2018: a map that stays would show the image, not the network."""
    images, classes, masks = scenes(6, seed=4000)
    other = narrow_resnet(1)
    learnt, unlearnt = grad_cam(network, images, classes), grad_cam(other, images, classes)
    pairs = zip(learnt.flatten(1), unlearnt.flatten(1), strict=True)
    alike = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    assert np.nanmean(alike) < 0.5
    assert share_on_object(unlearnt, masks).mean() < 0.8 * share_on_object(learnt, masks).mean()


def test_another_class_has_another_map(network: nn.Module) -> None:
    images, classes, masks = scenes(6, seed=5000)
    own, other = (grad_cam(network, images, wanted) for wanted in (classes, (classes + 1) % 3))
    assert share_on_object(own, masks).mean() > 1.5 * share_on_object(other, masks).mean()


def test_integrated_gradients_equal_captum(network: nn.Module) -> None:
    images, classes, _ = scenes(2, seed=6000)
    found = IntegratedGradients(network).attribute(images, target=classes, n_steps=32).sum(1).relu()
    smooth = torch.stack([blurred(part, 3) for part in found])
    assert torch.allclose(explain("integrated-gradients", network, images, classes), scaled(smooth), atol=1e-3)


def blurred(values: torch.Tensor, side: int) -> torch.Tensor:
    """The mean over the neighbours that there are, point by point."""
    half, found = side // 2, torch.empty_like(values)
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            found[y, x] = values[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1].mean()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_map_again(network: nn.Module, method: str) -> None:
    images, classes, _ = scenes(2, seed=7000)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, again = (explain(method, network, images, classes) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (2, SIZE, SIZE)
    assert first.min() >= 0 and first.max() <= 1 and first.max() > 0.5
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_scaling_uses_the_99_5th_percentile() -> None:
    found = scaled(torch.arange(2000.0).view(2, 40, 25))
    assert found[0].max() == 1 and found[0].view(-1)[497] == pytest.approx(497 / 994)
    assert torch.equal(scaled(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))


def test_overlay_does_not_change_pixels_without_evidence() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    heat = np.zeros((8, 8), np.float32)
    heat[:4] = 1
    found = overlay(image, heat)
    grey = image.astype(float).mean(axis=2, keepdims=True)
    assert np.abs(found[4:].astype(float) - ((image + grey) / 2)[4:]).max() <= 1
    assert (found[:4, :, 0].astype(int) - found[:4, :, 2]).mean() > 40, "strong evidence is red"


# The verb


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has made mistakes: it learnt little, and some validation labels are wrong."""
    from tests.conftest import TINY, make_folder

    root = tmp_path_factory.mktemp("explained")
    data = make_folder(root / "data", train=8, val=6)
    shutil.move(data / "val/cat/val000.png", data / "val/dog/moved.png")
    options = [*TINY, "--epochs", "1", "--batch-size", "12", "--opt", "adam", "--save-every", "99epochs"]
    assert main(["train", str(data), *options, "-o", str(root / "run")]) == 0
    return root / "run"


def mistakes(run: Path) -> list[dict[str, str]]:
    with (run / "eval/val/predictions.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["prediction"] != row["target"]]
    return sorted(rows, key=lambda row: -float(row["loss"]))


def test_the_worst_mistakes_are_explained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = mistakes(run)[:2]
    assert main(["explain", str(run), "--worst", "2", "--threads", "1"]) == 0
    out = run / "explain/gradcam"
    assert str(out / "sheet.png") in capsys.readouterr().out
    with (out / "explained.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [row["path"].endswith(e["path"]) for row, e in zip(found, expected, strict=True)] == [True] * len(found)
    assert [row["prediction"] for row in found] == [row["explained"] for row in found]
    assert [row["target"] for row in found] == [row["target"] for row in expected]
    for row, known in zip(found, expected, strict=True):
        assert float(row["probability"]) == pytest.approx(float(known["p1"]), rel=1e-3)
        with Image.open(out / row["file"]) as picture:
            assert picture.size == (32, 16)
    assert {file.name for file in out.iterdir()} == {"explained.csv", "sheet.png", *(row["file"] for row in found)}
    assert main(["explain", str(run), "--worst", "1", "--threads", "1"]) == 0
    assert len(list(out.glob("0*.png"))) == 1, "pictures of an earlier call do not stand among these"


def test_explains_given_images_and_a_given_class(run: Path, tmp_path: Path) -> None:
    files = sorted((run.parent / "data/val/emu").iterdir())
    out = tmp_path / "out"
    arguments = [str(files[0]), str(run.parent / "data/val/dog"), "--target", "emu", "--threads", "1"]
    assert main(["explain", str(run / "checkpoints/best.safetensors"), *arguments, "-o", str(out)]) == 0
    with (out / "explained.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert found[0]["path"] == str(files[0]) and len(found) == 8
    assert {row["explained"] for row in found} == {"emu"} and {row["target"] for row in found} == {""}


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["--target", "cta"], "did you mean 'cat'?"),
        (2, ["--method", "magic"], "must be one of gradcam"),
        (2, ["--split", "test"], "run `resnet-dist eval"),
        (2, ["--worst", "0"], "--worst"),
        (3, ["{bad}"], "bad.jpg: not an image"),
        (3, ["{none}"], "cannot be opened"),
        (2, ["https://example.org/cat.jpg"], "URLs are not supported"),
        (2, ["{empty}"], "no images found"),
    ],
)
def test_explain_refuses_wrong_input(
    run: Path, tmp_path: Path, refused: Refused, code: int, arguments: list[str], said: str
) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    places = {"bad": tmp_path / "bad.jpg", "none": tmp_path / "none.jpg", "empty": tmp_path / "empty"}
    assert said in refused(code, "explain", run, *(argument.format(**places) for argument in arguments))
    assert not (tmp_path / "out").exists()


def test_explain_of_a_checkpoint_names_the_missing_options(run: Path, refused: Refused) -> None:
    said = refused(2, "explain", run / "checkpoints/best.safetensors")
    assert "IMAGES are missing" in said and "--output-dir is missing" in said


def test_missing_captum_gives_one_line(run: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_captum(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == "captum":
            raise ModuleNotFoundError("No module named 'captum'", name="captum")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", no_captum)
    assert "pip install 'resnet-dist[explain]'" in refused(2, "explain", run, "--method", "occlusion", "--threads", "1")
    assert main(["explain", str(run), "--worst", "1", "--threads", "1"]) == 0, "gradcam needs no captum"
