"""What `predict` and `Predictor` take and refuse, and where they write: with a model of one layer that needs no run."""

import csv
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.predict import Predictor, Preprocessing, main
from tests.conftest import write_image
from tests.export.means import write_means

SPEC = Preprocessing(img_size=32, resize=32)
CLASSES = ["rot", "grün", "蓝"]
MODULE = [sys.executable, "-m", "resnet_dist", "predict"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_means(tmp_path_factory.mktemp("means") / "model.onnx", SPEC, CLASSES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, folder in enumerate(("a", "b", "b/c")):
        write_image(tmp_path / "photos" / folder / f"{number}.png", seed=number, size=(40, 36))
    return tmp_path / "photos"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[str], str]:
    """Exit code, the paths in the table, and the text on stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, [row["path"] for row in csv.DictReader(io.StringIO(said.out))], said.err


# The command line


@pytest.mark.parametrize(
    "order",
    [
        "{m} {p}/a {p}/b --top-k 1",
        "{m} --top-k 1 {p}/a {p}/b",
        "{m} {p}/a --top-k 1 {p}/b",
        "--top-k 1 {m} {p}/a {p}/b",
        "--strict {m} --top-k 1 {p}/a -b 2 {p}/b --threads 1",
    ],
)
def test_options_may_be_anywhere_on_the_command_line(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str], order: str
) -> None:
    code, paths, said = run(capsys, *order.format(m=model, p=photos).split(), "--format", "csv")
    assert (code, said) == (0, "")
    assert [Path(path).name for path in paths] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("arguments", [[], ["--top-k", "2"], ["--verify"], ["x.onnx", "--top-k"]])
def test_missing_arguments_are_a_usage_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, _, said = run(capsys, *arguments)
    assert (code == 2 and "MODEL" in said.upper()) or "--top-k" in said
    assert len(said.splitlines()) == 1


def test_images_are_found_as_training_finds_them(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Links are followed, hidden files and those of file managers are passed over, all others are counted."""
    write_image(tmp_path / "elsewhere/far.png", seed=5)
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "a/alias.png").symlink_to(tmp_path / "elsewhere/far.png")
    (photos / "a/loop").symlink_to(photos)
    for name in ("._0.png", ".hidden/x.png", "__MACOSX/x.png", "Thumbs.db", "b/.DS_Store"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"\0\5\26\7")
    for name in ("x.gif", "b/y.gif", "x.avif", "notes"):
        (photos / name).write_bytes(b"GIF89a")
    code, paths, said = run(capsys, model, photos)
    assert code == 0
    expected = ["a/0.png", "a/alias.png", "b/1.png", "b/c/2.png", "linked/far.png"]
    assert [os.path.relpath(path, photos) for path in paths] == expected
    assert "ignored (files that are not read as images: 1 without extension, 1 .avif, 2 .gif)" in said
    assert f"{photos}/a/loop is a link to a folder above it" in said


def test_a_pattern_may_name_folders(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, paths, _ = run(capsys, model, photos / "*")
    assert code == 0 and len(paths) == 3


@pytest.mark.parametrize("others", [[], ["x.gif", "y.txt"]])
def test_missing_images_are_reported_before_the_output_is_created(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[str]
) -> None:
    (tmp_path / "none").mkdir()
    for name in others:
        (tmp_path / "none" / name).touch()
    code, paths, said = run(capsys, model, tmp_path / "none", "-o", tmp_path / "out.csv")
    assert code == 3 and not paths and len(said.splitlines()) == 1
    assert f"{tmp_path}/none: no images found" in said and all(Path(name).suffix in said for name in others)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("name", ["x" * 300 + ".jpg", "x/" * 3000 + "y.jpg", "[", "[!", "a\\b.png", "\n.png"])
def test_odd_names_are_one_line(model: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, paths, _ = run(capsys, model, name)
    assert code == 3 and paths == [name]
    code, _, said = run(capsys, name, "x.png")
    assert code == 6 and said


def test_models_that_are_pipes_or_devices_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", "/dev/zero", "/dev/null", "x" * 300):
        code, _, said = run(capsys, name, "x.png")
        assert code == 6 and str(name) in said and len(said.splitlines()) == 1


# Streams


def started(model: Path, photos: Path, redirect: str, **environment: str) -> tuple[int, str, str]:
    words = [*MODULE, str(model), str(photos), "--threads", "1", "--format", "csv"]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "-", *words],
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    return done.returncode, done.stdout.decode("utf-8", "surrogateescape"), done.stderr.decode()


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        ("> /dev/full", 4, "standard output: cannot be written (No space left on device)"),
        (">&-", 4, "standard output: cannot be written (Bad file descriptor)"),
        ("2>&- <&-", 0, ""),
        ("2> /dev/full | cat", 0, ""),
        ("- < /dev/null", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed(model: Path, photos: Path, redirect: str, code: int, said: str) -> None:
    (photos / "x.gif").touch()  # so that there is something to say
    found, out, err = started(model, photos, redirect)
    assert found == code and said in err
    assert code or out.count(".png") == 3


def test_names_that_are_not_ascii_are_written_as_escapes_or_bytes(model: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_image(photos / "é.png", seed=1)
    (photos / "é.png").rename(os.fsdecode(bytes(photos) + b"/\xff\xc3\xa9.png"))
    _, plain, _ = started(model, photos, "", PYTHONUTF8="1")
    assert "\udcffé.png" in plain and any(name in plain for name in CLASSES)
    code, out, _ = started(model, photos, "", PYTHONIOENCODING="ascii")
    assert code == 0 and "\\xe9.png" in out and "gr\\xfcn" in out and "\\u84dd" in out


# The library


def kinds(file: Path) -> dict[str, Any]:
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    return {
        "str": str(file),
        "path": file,
        "bytes": file.read_bytes(),
        "Pillow": Image.fromarray(pixels),
        "array": pixels,
        "array with gaps": np.repeat(pixels, 2, axis=1)[:, ::2],
        "array, read only": np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape),
        "memory file": io.BytesIO(file.read_bytes()),
    }


def test_one_image_or_several_of_every_kind(model: Path, photos: Path) -> None:
    predictor = Predictor(model, threads=2)
    file = photos / "a/0.png"
    expected = next(predictor.predict([file])).probabilities
    for kind, image in kinds(file).items():
        (found,) = predictor.predict(image, batch_size=3)
        assert found.probabilities == expected and not found.error, kind
    for several in (list(kinds(file).values()), tuple(kinds(file).values()), iter(kinds(file).values())):
        assert [p.probabilities for p in predictor.predict(several, batch_size=2)] == [expected] * 8
    with file.open("rb") as stream:
        assert next(predictor.predict(stream)).probabilities == expected
    grey = np.random.default_rng(0).integers(0, 256, (50, 40), dtype=np.uint8)
    stack = np.stack([grey] * 3, axis=-1)
    assert len({p.probabilities for p in predictor.predict([grey, stack, Image.fromarray(grey)])}) == 1
    assert len(list(predictor.predict(np.stack([stack] * 4)))) == 4
    assert list(predictor.predict([])) == []


NO_IMAGES: dict[str, Callable[[], Any]] = {
    "number": lambda: 3,
    "None": lambda: None,
    "float array": lambda: np.zeros((8, 8, 3)),
    "16-bit array": lambda: np.zeros((8, 8), np.uint16),
    "four channels": lambda: np.zeros((8, 8, 4), np.uint8),
    "planes first": lambda: np.zeros((3, 8, 8), np.uint8),
    "vector": lambda: np.zeros(8, np.uint8),
    "empty array": lambda: np.zeros((0, 8, 3), np.uint8),
    "text file": lambda: io.StringIO("x"),
    "nested list": lambda: [["a.png"]],
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_a_value_that_is_not_an_image_is_a_type_error(model: Path, name: str) -> None:
    predictor = Predictor(model, threads=1)
    for given in (NO_IMAGES[name](), [NO_IMAGES[name]()]):
        with pytest.raises(TypeError, match="not an image; give a path"):
            list(predictor.predict(given))
    with pytest.raises(TypeError, match="not an image"):
        predictor.load(NO_IMAGES[name]())


@pytest.mark.parametrize("name", ["top_k", "batch_size"])
@pytest.mark.parametrize("number", [0, -1, 2.5, "3", True, None])
def test_numbers_that_are_wrong_are_a_value_error_at_once(model: Path, name: str, number: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number above 0"):
        Predictor(model, threads=1).predict([], **{name: number})
    with pytest.raises(ValueError, match="threads must be"):
        Predictor(model, threads=0)


def test_damage_in_a_pillow_image_is_an_error_of_that_image(model: Path, photos: Path) -> None:
    """Pillow reads pixels late: the image was opened, but the file is cut short."""
    data = (photos / "a/0.png").read_bytes()
    opened = Image.open(io.BytesIO(data[:-500]))
    bad, good = Predictor(model, threads=1).predict([opened, data])
    assert "damaged" in bad.error and not good.error
