"""`predict --sort-into` loses and overwrites nothing; `predict --stream` gives a row for every file that appears."""

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from unicodedata import normalize

import pytest

import export.predict as predict
from export.predict import ABSTAINED, Predictor, folder_names, main, watch
from tests.conftest import write_image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images in two folders, where two names occur twice."""
    for number in range(6):
        write_image(tmp_path / "photos" / f"sub{number % 2}" / f"{number // 2}.png", seed=number, tint=number)
    return tmp_path / "photos"


def labels(model: Path, folder: Path, limit: float = 0.0) -> dict[Path, str]:
    """Where each image belongs."""
    found = Predictor(model, 1, "cpu").predict(sorted(folder.rglob("*.png")), abstain_below=limit)
    return {Path(p.source): ABSTAINED if p.abstained else p.classes[0] for p in found}


def sort(model: Path, *arguments: str | Path) -> int:
    return main([str(model / "model.onnx"), *map(str, arguments), "--threads", "1", "--format", "csv"])


def contents(folder: Path) -> list[tuple[str, bytes]]:
    return sorted((file.parent.name, file.read_bytes()) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("how", ["copy", "link"])
def test_every_image_is_in_the_folder_of_its_class(
    bundle: Path, photos: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under its own name or the next free one; a second time, nothing changes."""
    bad = photos / "bad.png"
    bad.write_bytes(b"text")
    out = tmp_path / "out"
    options = ["--sort-into", out, *(["--link"] if how == "link" else []), "--abstain-below", "0.7"]
    assert sort(bundle, photos, *options) == 3
    said = capsys.readouterr().err
    bad.unlink()
    expected = labels(bundle, photos, 0.7)
    assert contents(out) == sorted((label, file.read_bytes()) for file, label in expected.items())
    for label in set(expected.values()):
        assert f"{list(expected.values()).count(label)} in {label}" in said
    sorted_files = [file for file in out.rglob("*") if not file.is_dir()]
    assert all(file.is_symlink() == (how == "link") for file in sorted_files)
    if how == "link":
        assert {file.readlink() for file in sorted_files} == set(expected)
    assert sort(bundle, photos, *options) == 0
    assert sorted(file for file in out.rglob("*") if not file.is_dir()) == sorted(sorted_files)


def test_nothing_is_overwritten(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of the same names are there: another image, a folder, and a link to nothing."""
    write_image(tmp_path / "in/a.png", seed=1)
    (label,) = labels(bundle, tmp_path / "in").values()
    place = tmp_path / "out" / label
    place.mkdir(parents=True)
    (place / "a.png").write_text("mine")
    (place / "a-2.png").mkdir()
    (place / "a-3.png").symlink_to("nowhere")
    assert sort(bundle, tmp_path / "in", "--sort-into", tmp_path / "out") == 0
    assert (place / "a.png").read_text() == "mine" and not list((place / "a-2.png").iterdir())
    assert (place / "a-3.png").is_symlink() and not (place / "nowhere").exists()
    assert (place / "a-4.png").read_bytes() == (tmp_path / "in/a.png").read_bytes()
    assert sort(bundle, tmp_path / "in", "--sort-into", tmp_path / "in/sorted") == 2
    assert "it lies in" in capsys.readouterr().err
    for target in (place / "a.png", tmp_path / "in"):
        (tmp_path / "in" / label).touch()
        assert sort(bundle, tmp_path / "in/a.png", "--sort-into", target) == 2
        assert "is a file; choose another folder" in capsys.readouterr().err


def test_a_link_is_no_copy(bundle: Path, tmp_path: Path) -> None:
    """Who asks for copies may delete the originals."""
    write_image(tmp_path / "in/a.png", seed=1)
    for _ in range(2):
        for how in ([], ["--link"]):
            assert sort(bundle, tmp_path / "in", "--sort-into", tmp_path / "copies", *how) == 0
    assert sort(bundle, tmp_path / "in", "--sort-into", tmp_path / "links", "--link") == 0
    assert sort(bundle, tmp_path / "in", "--sort-into", tmp_path / "links") == 0
    kinds = {
        name: [file.is_symlink() for file in sorted((tmp_path / name).rglob("*.png"))] for name in ("copies", "links")
    }
    assert kinds == {"copies": [False], "links": [False, True]}  # a-2.png, a.png


def test_an_interrupted_copy_has_no_name(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle; the same command then copies the whole image, as it does where there are no hard links."""
    write_image(tmp_path / "in/a.png", seed=1)
    whole = (tmp_path / "in/a.png").read_bytes()

    def half(source: BinaryIO, target: BinaryIO) -> None:
        target.write(whole[: len(whole) // 2])
        raise KeyboardInterrupt

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(predict.shutil, "copyfileobj", half)  # type: ignore[attr-defined]
        with suppress(KeyboardInterrupt):
            sort(bundle, tmp_path / "in", "--sort-into", tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    monkeypatch.setattr(os, "link", no_links)
    assert sort(bundle, tmp_path / "in", "--sort-into", tmp_path / "out") == 0
    (file,) = (file for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert (file.name, file.read_bytes()) == ("a.png", whole)


def test_a_full_disk_leaves_no_half_copy(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict.shutil, "copyfileobj", full)  # type: ignore[attr-defined]
    assert sort(bundle, photos, "--sort-into", tmp_path / "out") == 4
    assert "--sort-into" in (said := capsys.readouterr().err) and "No space left" in said
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_folder_names_are_safe_and_different(tmp_path: Path) -> None:
    """Names that leave the folder, are hidden, differ only in case, or that Windows keeps for itself."""
    classes = ["cat", "Cat", "a/b", "a_b", "..", ".", "../../etc", "", " x. ", "con", "NUL.txt", ABSTAINED, "\x1b[31m"]
    classes += ["ü" * 500, "a:b", "\ud800", "猫", ".hidden", "A_B"]
    classes += ["é", "e\u0301", "aux.txt", "CONIN$", "com¹"]  # two ways to write one letter
    names = folder_names(classes)
    assert list(names) != [] and set(names) == set(classes)
    assert names["cat"] == "cat" and names["a_b"] == "a_b" and names["猫"] == "猫"
    assert len({normalize("NFC", name).casefold() for name in names.values()} | {ABSTAINED}) == len(classes) + 1
    assert (names["aux.txt"], names["CONIN$"], names["com¹"]) == ("aux_.txt", "CONIN$_", "com¹_")
    for name in names.values():
        (tmp_path / name).mkdir()
        assert (tmp_path / name).parent == tmp_path and not name.startswith(".") and name.isprintable()
    assert len(list(tmp_path.iterdir())) == len(classes)


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    write_image(tmp_path / "in/first.png", seed=1)
    return tmp_path / "in"


@pytest.fixture
def stream(bundle: Path, watched: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(bundle / "predict.py"), str(bundle / "model.onnx"), str(watched), "--stream"]
    command += ["--threads", "1", "--format", "csv", "--top-k", "1", "--providers", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_row_for_every_file_that_appears(stream: subprocess.Popen[str], watched: Path, tmp_path: Path) -> None:
    """Files that are there, new ones in new folders, and one that is written slowly; Ctrl-C ends with complete rows."""
    assert stream.stdout is not None

    def row() -> list[str]:
        return next(csv.reader([next(iter(stream.stdout))]))  # type: ignore[arg-type]

    assert row()[0] == "path" and row()[0] == str(watched / "first.png")
    write_image(watched / "new/second.png", seed=2)
    assert row()[0] == str(watched / "new/second.png")
    write_image(tmp_path / "slow.png", seed=3, size=(64, 64))
    data = (tmp_path / "slow.png").read_bytes()
    with (watched / "slow.png").open("wb") as file:
        for start in range(0, len(data), len(data) // 4):
            file.write(data[start : start + len(data) // 4])
            file.flush()
            time.sleep(0.5)
    slow = row()
    assert slow[0] == str(watched / "slow.png") and slow[-1] == "" and slow[1]
    stream.send_signal(signal.SIGINT)
    out, err = stream.communicate(timeout=20)
    assert stream.returncode == 0 and out == "" and "Traceback" not in err


def test_changed_files_come_again_and_vanished_ones_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of its own: `sleep` moves it, and each look at the folder comes after one change."""
    now = [0.0]
    monkeypatch.setattr(predict.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    changes = {
        0.5: lambda: (tmp_path / "a.png").write_bytes(b"12"),
        2.5: lambda: (tmp_path / "b.png").write_bytes(b"1"),
        4.5: lambda: (tmp_path / "a.png").write_bytes(b"123"),
        6.5: lambda: (tmp_path / "b.png").unlink(),
        7.5: lambda: shutil.rmtree(tmp_path / "sub"),
        8.5: lambda: (tmp_path / "b.png").write_bytes(b"1"),
        10.5: lambda: stopped.append(1),
    }
    stopped: list[int] = []

    def sleep(seconds: float) -> None:
        assert seconds > 0
        now[0] += 0.5
        if now[0] in changes:
            changes[now[0]]()

    monkeypatch.setattr(predict.time, "sleep", sleep)  # type: ignore[attr-defined]
    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / "empty.png").touch()
    (tmp_path / "sub").mkdir()
    found = [(now[0], [Path(path).name for path in paths]) for paths in watch([str(tmp_path)], stopped)]
    assert found == [(1.5, ["a.png"]), (3.5, ["b.png"]), (5.5, ["a.png"]), (9.5, ["b.png"])]


def test_a_watched_folder_that_vanishes_ends_the_stream(
    bundle: Path, watched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict.time, "sleep", lambda seconds: shutil.rmtree(watched))  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGINT)
    assert main([str(bundle / "model.onnx"), str(watched), "--stream", "--threads", "1"]) == 3
    assert f"{watched}: cannot be listed" in capsys.readouterr().err and signal.getsignal(signal.SIGINT) == before


def test_a_list_with_urls_or_videos_is_one_line(
    bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    for line, said in (("https://example.org/cat.jpg", "URLs are not"), ("clip.mp4", "videos are not")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos}/sub0/0.png\n{line}\n"))
        assert main([str(bundle / "model.onnx"), "-", "--threads", "1"]) == 2
        assert f"{line}: {said}" in capsys.readouterr().err
