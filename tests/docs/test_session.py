"""The commands of the pages and of the README run, each once, in one folder with few small images and one trained run.

A training is planned (`--dry-run`) and not done. What needs a launcher, the network or minutes is only parsed.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf

from export.browser import PACKAGE, RUNTIME
from resnet_dist.cli.main import VERBS, main
from tests import test_readme
from tests.conftest import made_once, make_folder, write_image
from tests.docs.markdown import ALL, DOCS, Command, blocks

pytestmark = pytest.mark.matrix

QUICK = [
    "--model",
    "resnet18",
    "--img-size",
    "32",
    "--threads",
    "1",
    "--workers",
    "0",
    "--weights",
    "resnet18.safetensors",
]
SLOW = ("demo", "doctor", "bench", "bench ladder", "bench scaling", "lr-find", "reproduce", "serve")  # each has tests
PLANNED = ("train", "compare")
FOLDERS = ("photos", "fruits", "cifar10", "hymenoptera", "cats_dogs", "photos_train", "photos_val")
RUNS = ("fruits", "cifar10", "cd-full", "cd-head", "cd-head-bn", "cd-l34", "macro", "balanced", "focal")
PYTHON = (
    "reference/python.md",
    "reference/run-folder.md",
    "how-to/serve.md",
    "how-to/publish.md",
    "how-to/other-languages.md",
)


def make(place: Path) -> None:
    """Folders, files and runs of the names that the pages use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in FOLDERS:
            make_folder(Path(name), train=24 if name == "photos" else 12, val=0)  # int8 needs 64 images
        make_folder(Path("parts"), train=24, val=12)
        shutil.copytree("parts/val", "parts/test")
        for label in ("cat", "dog"):
            for number in range(6):
                write_image(Path(f"flat/{label}.{number}.png"), seed=number)
                write_image(Path(f"patients/{label}/patient{number}/{number}.png"), seed=number)
        make_folder(Path("new_photos"), train=2, val=0, classes=["unsorted"])
        write_image(Path("cat.jpg"), seed=0)
        Path("exclude.csv").write_text("path\ncat/train000.png\n")
        Path("weights.toml").write_text('"cat" = 1.0\n"dog" = 3.5\n"emu" = 1.0\n')
        save_file(torchvision.models.resnet18().state_dict(), "resnet18.safetensors")
        save_for_hf(timm.create_model("resnet18.a1_in1k"), "resnet18.a1_in1k", safe_serialization=True)
        make_folder(Path("imagenet_val"), train=2, val=0, classes=["n01440764", "n01443537"])
        for name in RUNTIME:  # `export --web` only copies them
            file = PACKAGE / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
        Path("mine.toml").write_text("[optim]\nlr = 0.01\n")
        assert main(["train", "parts", *QUICK, "--epochs", "1", "-o", "runs/photos"]) == 0
        for name in RUNS:
            shutil.copytree("runs/photos", f"runs/{name}")


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = made_once(tmp_path_factory, "session", make)
    monkeypatch.chdir(folder)
    return folder


def runnable() -> Iterator[Command]:
    """Every command of ours, once for all runs, in the order of the pages; those of the README last."""
    seen = set()
    readme = (Command("README.md", ("resnet-dist", *line)) for line in test_readme.commands())
    for command in (*ALL, *readme):
        verb = next((v for v in (" ".join(command.words[1:3]), command.words[1]) if v in VERBS), "")
        parsed_only = verb in SLOW or {"RUN", "DATA", "...", "--push-to-hub", "--help", "--stream"} & set(command.words)
        parsed_only = parsed_only or "hf://" in str(command.words)
        words = " ".join(word for word in command.words if word != "--overwrite")
        key = re.sub(r"runs/[\w-]+", "runs/*", words)  # all runs are copies of one
        if command.words[0] == "resnet-dist" and not parsed_only and key not in seen:
            seen.add(key)
            yield command


def quick(words: list[str]) -> list[str]:
    """The command with what makes it take a second, and able to run again."""
    verb = words[0]
    if verb == "split":
        Path(words[2]).unlink(missing_ok=True)
    if verb in PLANNED and "--runs" not in words and words[1] != "--resume":
        replaced = ["--overwrite"] if verb == "train" and "--resume" not in words else []
        new = [word.replace("runs/photos", "runs/new") if "--resume" in words else word for word in words]
        return [*new, *quick_options(words), *replaced, "--dry-run"]
    if verb == "train" and "--epochs" in words:
        return [*words, "--dry-run"]  # more epochs of a finished run
    if verb == "export":
        lenient = ["--min-agreement", "0", "--max-accuracy-drop", "100"]  # the network has learned nothing
        return [*words, "--overwrite", *(lenient if "--int8" in words else [])]
    return [word if word != "0.9" else "0.1" for word in words]  # a precision that this network proves


def quick_options(words: list[str]) -> list[str]:
    """QUICK without the options that the command has itself."""
    pairs = zip(QUICK[::2], QUICK[1::2], strict=True)
    own = set(words) | ({"--weights"} if "--init-from" in words or "cifar10-from-scratch" in words else set())
    own |= {"--img-size"} if {"--imgsz", "--resize"} & own else set()
    own |= {"--weights"} if "--model" in own and "resnet18" not in own else set()
    return [word for pair in pairs if pair[0] not in own for word in pair]


def test_every_command_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = []
    for command in runnable():
        capsys.readouterr()
        words = quick(list(command.words[1:]))
        if main(words) != 0:
            failed.append(f"{command} ({' '.join(words)}): {capsys.readouterr().err}")
        elif command.output:
            Path(command.output).write_text(capsys.readouterr().out)
    assert not failed, "\n".join(failed)
    assert Path("hub/photos/model.safetensors").exists() and Path("photos.csv").exists()


@pytest.mark.parametrize("name", PYTHON)
def test_python_blocks_run(name: str, place: Path) -> None:
    if not Path("runs/photos/export/model.onnx").exists():
        assert main(["export", "runs/photos", "--images", "4"]) == 0
    if name == "how-to/other-languages.md":
        pytest.importorskip("openvino", reason="needs openvino")
        assert main(["export", "runs/photos", "--images", "4", "--openvino", "--overwrite"]) == 0
    if not Path("hub/photos").exists():
        assert main(["hub", "runs/photos", "-o", "hub/photos", "--license", "mit"]) == 0
    namespace: dict[str, object] = {}
    for block in blocks(DOCS / name, "python"):
        exec(block, namespace)
    if "classify" in namespace:
        said = namespace["classify"](Path("cat.jpg").read_bytes())  # type: ignore[operator]
        assert len(said["classes"]) == 3
        assert "error" in namespace["classify"](b"no image")  # type: ignore[operator]
