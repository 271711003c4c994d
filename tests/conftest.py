"""What the tests share: tiny image folders, real data where it lies beside the project, ways to run the program."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from resnet_dist.cli.main import main

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CLASSES = ("cat", "dog", "emu")

# Two test processes share the cores, and so do the programs that they start: a thread that waits must not spin. torch
# reads this when it is loaded, which nothing above does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The smallest network and images that go through every part of the program, as command-line options.
TINY = ["--model", "resnet18", "--weights", "none", "--stem", "small", "--img-size", "16", "--workers", "0"]
TINY += ["--threads", "1", "--mixed-precision", "no"]
WITH_REPORT = list(TINY)
TINY += ["--no-report"]  # a third of the time of such a run


def write_image(file: Path, seed: int, tint: int = 0, size: tuple[int, int] = (24, 20)) -> None:
    """A noise picture of (width, height) whose channel `tint` is dark: a class that can be learnt."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., tint % 3] //= 4
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def make_folder(root: Path, train: int = 8, val: int = 5, classes: Sequence[str] = CLASSES) -> Path:
    """train/ and val/ with this many PNG images per class; with val=0, class folders directly below the root."""
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            for i in range(count):
                place = root / name if val == 0 else root / split / name
                write_image(
                    place / f"{split}{i:03d}.png", seed=1000 * number + i + (500 if split == "val" else 0), tint=number
                )
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/ of three classes; not to be changed by a test."""
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def notebook_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a Jupyter kernel that runs this Python and finds this package."""
    kernel = tmp_path / "jupyter" / "kernels" / "here"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(kernel.parents[1]))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return kernel.name


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills: one for all test processes side by side, which wait for the one that makes it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of a worker is its own
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and real weights. Skips if they are missing; in CI that is an error."""
    if not SHARED.is_dir():
        if os.environ.get("RESNET_DIST_CI"):
            pytest.fail(f"{SHARED} is missing, which CI must have")
        pytest.skip(f"needs the real data in {SHARED}, which is not part of the repository")
    return SHARED


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the program in this process, expect this exit code, and return its stderr, which has one line per error."""

    def run(code: int, *arguments: str | Path) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr().err
        assert said.strip() and "Traceback" not in said
        return said

    return run


def run_program(
    *arguments: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "resnet_dist", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}, cwd=cwd
    )


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk of this size (such as 30m), mounted at `place`. Skips where that is not allowed; in CI as root it must be.

    It is unmounted after the block, whatever is still open there.
    """
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True
    )
    if done.returncode:
        if os.environ.get("RESNET_DIST_CI") and os.getuid() == 0:
            pytest.fail(f"mount: {done.stderr}")
        pytest.skip(f"needs to mount a disk ({done.stderr.strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
