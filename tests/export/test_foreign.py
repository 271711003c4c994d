"""Weights that resnet-dist did not write: evaluated and exported as timm and torchvision compute, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from export.predict import Predictor, decode, fit
from resnet_dist import evaluate
from resnet_dist.cli.main import main
from tests.conftest import write_image
from tests.model.test_published import timm_folder

Refused = Callable[..., str]
NAMES = ("ant", "bee", "cat")
GIVEN = ["--model", "resnet18", "--preprocessing", "IMAGENET1K_V1"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of timm with a network for 48 pixels of three classes; not to be changed by a test."""
    return timm_folder(tmp_path_factory.mktemp("foreign"), input_size=(3, 48, 48))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of each class, of different sizes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(15):
        size = (60 + 7 * number, 90 - 2 * number)
        write_image(root / NAMES[number % 3] / f"{number}.png", seed=number, tint=number, size=size)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pth file of torchvision with three outputs, which says nothing else."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("plain") / "mine.pth"
    torch.save({"model": torchvision.models.resnet18(num_classes=3).state_dict(), "epoch": 3}, file)
    return file


def logits_of_timm(folder: Path, files: list[Path]) -> np.ndarray:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return torch.stack([model(prepare(Image.open(file).convert("RGB"))[None])[0] for file in files]).numpy()


def logits_of_export(model: Path, files: list[Path]) -> np.ndarray:
    predictor = Predictor(model, threads=1, providers="cpu")
    return np.concatenate([predictor.logits(fit(decode(file), predictor.preprocessing)[None]) for file in files])


def test_folder_of_timm_is_exported_and_evaluated_as_timm_computes(
    foreign: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(photos.rglob("*.png"))
    out = tmp_path / "export"
    assert main(["export", str(foreign), "--data", str(photos), "-o", str(out), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"resnet18, 3 classes from {foreign}/config.json, licence apache-2.0" in shown
    assert "preprocessing: crop 50 px cropped to 48, bicubic" in shown and "verifying on given images" in shown
    expected = logits_of_timm(foreign, files)
    np.testing.assert_allclose(logits_of_export(out / "model.onnx", files), expected, rtol=0, atol=1e-4)
    predictor = Predictor(out / "model.onnx", threads=1)
    assert predictor.classes == NAMES
    assert predictor.metadata["origin"] == {
        "file": "model.safetensors",
        "classes": f"{foreign}/config.json",
        "preprocessing": f"{foreign}/config.json",
        "license": "apache-2.0",
    }
    found = evaluate(foreign, photos, workers=0, threads=1)
    assert found.classes == NAMES
    order = [files.index(found.table.root / path) for path in found.table.paths]
    assert found.records.prediction.tolist() == expected.argmax(1)[order].tolist()


def test_python_takes_foreign_weights_too(plain: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    given = {"model": "resnet18", "classes": tmp_path / "names.json", "preprocessing": "IMAGENET1K_V1"}
    found = evaluate(plain, photos, workers=0, threads=1, **given)
    assert found.classes == NAMES and not (plain.parent / "eval").exists()
    assert (found.spec.img_size, found.spec.resize) == (224, 256)


# What is refused


def arguments(file: Path, data: Path, *options: str | Path) -> list[str | Path]:
    return ["eval", file, data, "--no-save", "--workers", "0", "--threads", "1", *options]


def test_what_a_file_does_not_say_must_be_given(plain: Path, photos: Path, tmp_path: Path, refused: Refused) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    for missing, given in (
        ("--model is missing: {} does not name its network; it fits --model resnet18", []),
        ("--classes is missing: {} does not name its 3 classes", ["--model", "resnet18"]),
        ("--preprocessing is missing: {} does not say how", ["--model", "resnet18", "--classes", names]),
    ):
        said = refused(2, *arguments(plain, photos, *given))
        assert missing.format(plain) in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ant\nbee\n", "2 names, but "),
        ("ant\nbee\nant\n", "the class name 'ant' is empty, too long or given twice"),
        ("ant\n\ncat\n", "the class name '' is empty, too long or given twice"),
        ('["ant", "bee", 3]', "the JSON list must contain names"),
        ('["ant", "bee"', "neither lines of text nor a JSON list"),
        (b"\xff\xfe\x00", "neither lines of text nor a JSON list"),
    ],
)
def test_wrong_class_names_are_refused(
    plain: Path, photos: Path, tmp_path: Path, refused: Refused, text: str | bytes, problem: str
) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused(2, *arguments(plain, photos, *GIVEN, "--classes", names))
    assert f"--classes {names}: {problem}" in said and len(said.splitlines()) == 1


def test_wrong_options_are_refused(plain: Path, foreign: Path, photos: Path, tmp_path: Path, refused: Refused) -> None:
    assert "1000 names, but " in refused(2, *arguments(plain, photos, *GIVEN, "--classes", "imagenet"))
    assert "must be imagenet, wordnet or a file" in refused(2, *arguments(plain, photos, *GIVEN, "--classes", "absent"))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    wrong = ["--model", "resnet18", "--classes", names, "--preprocessing"]
    assert "must be IMAGENET1K_V1, IMAGENET1K_V2 or a" in refused(2, *arguments(plain, photos, *wrong, "absent"))
    (tmp_path / "config.json").write_text("{}")
    assert "without pretrained_cfg" in refused(2, *arguments(plain, photos, *wrong, tmp_path / "config.json"))
    said = refused(6, *arguments(foreign, photos, "--model", "resnet34"))
    assert "does not fit resnet34: " in said and "it fits --model resnet18" in said


def test_checkpoint_of_resnet_dist_needs_no_options(
    small_run: Path, bundle: Path, photos: Path, refused: Refused
) -> None:
    best = small_run / "checkpoints/best.safetensors"
    for source in (best, small_run):
        said = refused(2, *arguments(source, photos, "--model", "resnet18"))
        assert "was written by resnet-dist and contains this" in said and "--model" in said
    said = refused(2, *arguments(bundle / "model.onnx", photos, "--classes", "imagenet"))
    assert "--classes needs weights that resnet-dist did not write, not an exported model" in said


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["fc.weight"], tensors["fc.bias"]


def small_stem(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv1.weight"] = torch.zeros(64, 3, 3, 3)


def odd_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.weight"] = torch.zeros(3, 100)


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.bias"] = torch.full((3,), torch.nan)


def two_heads(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc2.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without_head, "no classifier of a resnet18 (fc.weight is missing"),
        (small_stem, "its first convolution is 3x3"),
        (odd_head, "fc.weight has shape (3, 100) instead of (3, 512)"),
        (not_finite, "fc.bias contains values that are not finite"),
        (two_heads, "fc2.weight is unknown"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    foreign: Path, photos: Path, tmp_path: Path, refused: Refused, change: Callable[[Any], None], problem: str
) -> None:
    tensors = load_file(foreign / "model.safetensors")
    change(tensors)
    shutil.copy(foreign / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    said = refused(6, *arguments(tmp_path, photos))
    assert problem in said and len(said.splitlines()) == 1


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("attacked"),))


def test_pickled_code_is_not_run(
    photos: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Attack()}, tmp_path / "evil.pth")
    said = refused(6, *arguments(tmp_path / "evil.pth", photos, *GIVEN, "--classes", "imagenet"))
    assert "not a weights file that can be read safely (it contains more than tensors; load it where you" in said
    assert len(said.splitlines()) == 1 and not Path("attacked").exists()
    for name, value in {"sparse": torch.eye(3).to_sparse(), "meta": torch.empty(3, device="meta")}.items():
        torch.save({"fc.bias": value}, tmp_path / f"{name}.pth")
        said = refused(6, *arguments(tmp_path / f"{name}.pth", photos, *GIVEN, "--classes", "imagenet"))
        assert "fc.bias is sparse, quantized or without values, not an ordinary tensor" in said
    (tmp_path / "empty.pth").touch()
    said = refused(6, *arguments(tmp_path / "empty.pth", photos, *GIVEN, "--classes", "imagenet"))
    assert "(it is empty or ends early)" in said


def test_folder_without_weights_is_named(photos: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "a folder without model.safetensors or pytorch_model.bin" in refused(6, *arguments(tmp_path, photos))


# Real weights and photographs


@pytest.mark.matrix
def test_real_weights_give_torchvisions_logits(shared: Path, tmp_path: Path) -> None:
    """The export of an ImageNet resnet18 classifies photographs of ants and bees as plain torchvision does."""
    weights = shared / "weights/resnet18.safetensors"
    for name in ("ant", "bee"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for file in sorted((shared / f"hymenoptera/val/{name}s").iterdir())[:20]:
            shutil.copy(file, folder)
    given = ["--model", "resnet18", "--classes", "imagenet", "--preprocessing", "IMAGENET1K_V1"]
    out = tmp_path / "export"
    assert main(["export", str(weights), *given, "--data", str(tmp_path / "photos"), "-o", str(out)]) == 0
    model = torchvision.models.resnet18().eval()
    model.load_state_dict(load_file(weights))
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    prepare, files = entry.transforms(), sorted((tmp_path / "photos").rglob("*.jpg"))
    with torch.inference_mode():
        expected = torch.cat([model(prepare(Image.open(file).convert("RGB"))[None]) for file in files]).numpy()
    np.testing.assert_allclose(logits_of_export(out / "model.onnx", files), expected, rtol=0, atol=1e-4)
    predictor = Predictor(out / "model.onnx")
    assert list(predictor.classes) == entry.meta["categories"]
    right = [
        predictor.classes[int(row.argmax())] == file.parent.name for row, file in zip(expected, files, strict=True)
    ]
    assert sum(right) / len(right) > 0.5


@pytest.mark.matrix
def test_wordnet_ids_are_timms_in_the_order_of_torchvision(shared: Path, photos: Path, tmp_path: Path) -> None:
    """n01440764 is the tench, class 0."""
    (tmp_path / "photos").mkdir()
    shutil.copytree(photos / "ant", tmp_path / "photos/n01440764")
    weights = shared / "weights/resnet18.safetensors"
    found = evaluate(
        weights,
        tmp_path / "photos",
        model="resnet18",
        classes="wordnet",
        preprocessing="IMAGENET1K_V1",
        workers=0,
    )
    assert found.classes[0] == "n01440764" and found.table.targets.tolist() == 5 * [0]
