"""Files from strangers: nothing in them runs, no path in them is followed, and reading them takes little."""

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import EpsImagePlugin, Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export.predict import ModelError, Predictor, digest_of
from resnet_dist.cli.main import main
from resnet_dist.errors import ArtifactError, ResnetDistError, UsageError
from resnet_dist.files.header import description_in
from resnet_dist.files.reading import parse_json, read_bounded
from resnet_dist.files.run import MANIFEST, read_facts
from resnet_dist.model.checkpoint import load_checkpoint
from resnet_dist.training.state import FACTS, TENSORS, read_newest_state
from tests.conftest import TINY, WITH_REPORT, make_folder, write_image

Refused = Callable[..., str]
BEST = "checkpoints/best.safetensors"


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose manifest names its classes as an attacker would, exported; not to be changed by a test."""
    root = tmp_path_factory.mktemp("hostile")
    rows = ["path,label,split"]
    for number, name in enumerate(CLASSES):
        for i in range(6):
            write_image(root / f"data/images/{number}-{i}.png", seed=10 * number + i, tint=number)
            cell = name.replace('"', '""')
            rows.append(f'images/{number}-{i}.png,"{cell}",{"train" if i < 4 else "val"}')
    (root / "data/list.csv").write_text("\n".join(rows) + "\n", newline="")
    command = ["train", str(root / "data/list.csv"), *WITH_REPORT, "--epochs", "1", "-o", str(root / "a/b/run")]
    assert main(command) == 0
    assert main(["export", str(root / "a/b/run"), "--threads", "1"]) == 0
    return root / "a/b/run"


CLASSES = ("../../../a", "/etc/cron.d/x", "\x1b[2J\x1b]0;owned\x07", "[/red][bold", "$\\frac{", "=1+1|' /C x'!A0")


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change. Its large files are hard links: remove them before writing."""

    def copy(source: str, to: str) -> None:
        os.link(source, to) if Path(source).stat().st_size > 1 << 20 else shutil.copy2(source, to)

    return shutil.copytree(run, tmp_path / "run", copy_function=copy)


# Names


def test_class_names_are_never_paths(run: Path) -> None:
    """Of what was written nothing lies outside the run folder, and no folder or file bears such a name."""
    root = run.parents[2]
    assert sorted(path.name for path in root.iterdir()) == ["a", "data"]
    assert [path.name for path in (root / "a").iterdir()] == ["b"]
    assert [path.name for path in (root / "a/b").iterdir()] == ["run"]
    assert sorted(path.name for path in (root / "data").iterdir()) == ["images", "list.csv"]
    assert not [path for path in run.rglob("*") if "owned" in path.name or "cron" in path.name or path.is_symlink()]


def test_names_come_through_unchanged(run: Path) -> None:
    with safe_open(run / BEST, framework="pt") as opened:
        assert json.loads(opened.metadata()["resnet_dist"])["classes"] == sorted(CLASSES)
    assert Predictor(run, threads=1).classes == tuple(sorted(CLASSES))


@pytest.mark.parametrize("verb", ["train", "eval", "check", "predict", "export"])
def test_names_cannot_control_the_terminal(
    run: Path, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By names of classes or files: no control character but line feeds is printed."""
    data, name = run.parents[2] / "data", tmp_path / "evil\x1b[2J.png"
    shutil.copy(data / "images/0-0.png", name)
    os.utime(name)
    arguments = {
        "train": [data / "list.csv", *TINY, "--epochs", "1", "--dry-run"],
        "eval": [run, "--threads", "1", "-o", tmp_path / "eval"],
        "check": [data / "list.csv", "--no-cache"],
        "predict": [run, name, "--format", "table"],
        "export": [run, "--threads", "1", "-o", tmp_path / "export"],
    }[verb]
    capsys.readouterr()
    assert main([verb, *map(str, arguments)]) == 0
    said = "".join(capsys.readouterr())
    assert said.strip() and not [c for c in said if not c.isprintable() and c != "\n"]


def test_label_that_is_a_folder_above_is_refused(tmp_path: Path, refused: Refused) -> None:
    """`split` makes folders of labels that a pattern finds in file names."""
    for name in ("..-1.png", "..-2.png", "cat-1.png", "cat-2.png"):
        write_image(tmp_path / "flat" / f"x{name}", seed=0)
    said = refused(3, "split", tmp_path / "flat", tmp_path / "out", "--how", "copy", "--label-by", "x(.*)-")
    assert "'..'" in said and not (tmp_path / "out").exists()


# Code


def spoil_with_pickles(run: Path, marker: Path) -> None:
    """Pickles under every name that a trainer would load, next to our files and in place of them."""
    evil = pickle.dumps(Malicious(marker))
    state = next((run / "checkpoints").glob("step-*"))
    for folder in (run, run / "checkpoints", state):
        for name in (
            "custom_checkpoint_0.pkl",
            "optimizer.bin",
            "scheduler.bin",
            "pytorch_model.bin",
            "random_states_0.pkl",
        ):
            (folder / name).write_bytes(evil)
    for file in (state / FACTS, state / TENSORS, run / BEST):
        file.unlink()
        file.write_bytes(evil)
    digests = {name: sha256(evil).hexdigest() for name in (FACTS, TENSORS)}
    (state / MANIFEST).write_text(json.dumps(digests))


@pytest.mark.parametrize("verb", ["resume", "eval", "export", "init-from"])
def test_planted_pickles_are_not_loaded(own: Path, tmp_path: Path, verb: str, refused: Refused) -> None:
    marker, data = tmp_path / "marker", own.parents[0]
    spoil_with_pickles(own, marker)
    facts = read_facts(own)
    (own / "run.json").write_text(json.dumps({**facts, "status": "failed"}))
    make_folder(data / "images", train=3, val=2)
    command: list[str | Path] = {
        "resume": ["train", "--resume", own],
        "eval": ["eval", own, "--threads", "1"],
        "export": ["export", own, "--threads", "1", "--overwrite"],
        "init-from": ["train", data / "images", "--init-from", own, "-o", tmp_path / "new"],
    }[verb]
    assert str(own) in refused(6, *command)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_planted_pickle_would_have_worked(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("verb", ["check", "train", "predict"])
def test_eps_named_jpg_runs_no_ghostscript(
    run: Path, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow alone would run the first `gs` on PATH; test_preprocessing checks that it would."""
    data, marker = make_folder(tmp_path / "data", train=3, val=2), tmp_path / "marker"
    Image.new("RGB", (9, 9)).save(data / "train/cat/photo.eps", "EPS")
    (data / "train/cat/photo.eps").rename(data / "train/cat/photo.jpg")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{marker}'\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    command = {
        "check": ["check", data, "--no-cache"],
        "train": ["train", data, *TINY, "--check", "full", "-o", tmp_path / "x"],
        "predict": ["predict", run, data / "train/cat/photo.jpg"],
    }[verb]
    assert main([str(part) for part in command]) == 3
    said = "".join(capsys.readouterr())
    assert "photo.jpg" in said and not marker.exists()


# Models


def resealed(source: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The model with another description and a checksum that fits it: a digest is no signature."""
    model = onnx.load(source, load_external_data=False)
    properties = {entry.key: entry for entry in model.metadata_props}
    values = json.loads(properties["resnet_dist"].value)
    change(values)
    properties["resnet_dist"].value = json.dumps(values)
    properties["resnet_dist_sha256"].value = "0" * 64
    digest = digest_of(model.SerializeToString(), "0" * 64)
    properties["resnet_dist_sha256"].value = digest
    to.write_bytes(model.SerializeToString())
    return to


def test_resealed_model_loads_where_nothing_is_wrong(run: Path, tmp_path: Path) -> None:
    """Else the refusals below would show nothing."""
    assert Predictor(resealed(run / "export/model.onnx", tmp_path / "m.onnx", lambda values: None), threads=1).verify()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 10**400},
        {"temperature": float("nan")},
        {"self_test": "abcdef"},
        {"self_test": [{}] * len(CLASSES)},
        {"classes": ["x" * 5000] * len(CLASSES)},
        {"classes": [""] * len(CLASSES)},
        {"preprocessing": {"img_size": 10**9}},
        {"precision": ["fp32"]},
        {"precision": {}},
    ],
    ids=str,
)
def test_descriptions_that_do_not_fit_are_refused(run: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    file = resealed(run / "export/model.onnx", tmp_path / "m.onnx", lambda values: values.update(changes))
    with pytest.raises(ModelError, match="not a model that resnet-dist exported"):
        Predictor(file, threads=1)


@pytest.mark.parametrize("how", ["..", "absolute", "link", "hard link"])
def test_external_data_is_never_read(run: Path, tmp_path: Path, how: str) -> None:
    """Not even by a hard link, which onnxruntime by itself reads."""
    secret, inside = tmp_path / "secret.bin", tmp_path / "m/weights.bin"
    inside.parent.mkdir()
    model = onnx.load(run / "export/model.onnx")
    onnx.save(model, inside.parent / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    inside.rename(secret)
    if how == "link":
        inside.symlink_to(secret)
    elif how == "hard link":
        inside.hardlink_to(secret)
    outside = onnx.load(inside.parent / "m.onnx", load_external_data=False)
    place = {"..": "../secret.bin", "absolute": str(secret)}.get(how, "weights.bin")
    for tensor in outside.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    file = inside.parent / "m.onnx"
    file.write_bytes(outside.SerializeToString())
    with pytest.raises(ModelError, match=r"onnxruntime .* cannot load"):  # and not: its checksum
        Predictor(resealed(file, file, lambda values: None), threads=1)


# Checkpoints


def header_with(change: Callable[[dict[str, Any]], object], source: Path, to: Path) -> Path:
    """The checkpoint with a changed header before the same bytes of tensors."""
    data = source.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    changed += b" " * (-len(changed) % 8)
    to.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])
    return to


def _rename(header: dict[str, Any]) -> None:
    header["../../etc/x"] = header.pop("fc.weight")


MALFORMED: dict[str, Callable[[dict[str, Any]], object]] = {
    "path as a name": _rename,
    "missing tensor": lambda h: h.pop("bn1.bias"),
    "more tensors": lambda h: h.update(
        {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(999)}
    ),
    "other type": lambda h: h["fc.weight"].update(dtype="I32"),
    "other shape": lambda h: h["fc.weight"].update(shape=h["fc.weight"]["shape"][::-1]),
    "overlap": lambda h: h["bn1.bias"].update(data_offsets=h["bn1.weight"]["data_offsets"]),
    "beyond the end": lambda h: h["fc.weight"].update(data_offsets=[0, 2**40]),
    "negative": lambda h: h["fc.weight"].update(data_offsets=[-4, 0]),
    "huge shape": lambda h: h["fc.weight"].update(shape=[2**40, 2**40]),
    "no object": lambda h: h.update({"fc.weight": 3}),
    "metadata is a list": lambda h: h.update(__metadata__=[]),
    "no description": lambda h: h.update(__metadata__={"format": "pt"}),
    "description is a number": lambda h: h.update(__metadata__={"resnet_dist": "3"}),
    "description nests": lambda h: h.update(__metadata__={"resnet_dist": "[" * 100_000}),
    "description is not text": lambda h: h.update(__metadata__={"resnet_dist": {}}),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_checkpoints_are_refused(run: Path, tmp_path: Path, kind: str) -> None:
    file = header_with(MALFORMED[kind], run / BEST, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"x\.safetensors") as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)


DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "a million classes": {"classes": [f"c{i}" for i in range(1_000_000)]},
    "an endless name": {"classes": ["x" * 2000, "b"]},
    "no classes": {"classes": []},
    "epoch is text": {"epoch": "3"},
    "score is text": {"score": "best"},
    "score of text": {"score": {"top1": "../x"}},
    "config is a list": {"config": []},
    "kind is unknown": {"weights_kind": "../x"},
    "hidden is a path": {"head": {"name": "mlp", "hidden": ["../x"], "dropout": 0}},
    "hidden takes the memory": {"head": {"name": "mlp", "hidden": [65536] * 16, "dropout": 0}},
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_hostile_descriptions_are_refused(run: Path, tmp_path: Path, kind: str) -> None:
    description = {**(description_in(run / BEST) or {}), **DESCRIPTIONS[kind]}
    save_file(load_file(run / BEST), tmp_path / "x.safetensors", {"resnet_dist": json.dumps(description)})
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        load_checkpoint(tmp_path / "x.safetensors")
    assert time.monotonic() - started < 10


# States and facts


def resealed_state(run: Path, **changes: Any) -> None:
    """Other facts in the newest state, under a manifest that fits them."""
    state = max((run / "checkpoints").glob("step-*"))
    facts = json.loads((state / FACTS).read_bytes()) | changes
    (state / FACTS).write_text(json.dumps(facts))
    names = (FACTS, TENSORS)
    (state / MANIFEST).write_text(json.dumps({name: sha256((state / name).read_bytes()).hexdigest() for name in names}))
    (run / "run.json").write_text(json.dumps({**read_facts(run), "status": "failed"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"state": {}},
        {"state": []},
        {"state": {"phase": -1}},
        {"config": "x"},
        {"data": 3},
    ],
    ids=str,
)
def test_hostile_states_are_refused(own: Path, changes: dict[str, Any], refused: Refused) -> None:
    resealed_state(own, **changes)
    said = refused(6, "train", "--resume", own, "--epochs", "2")
    assert str(own) in said and said.count("\n") == 1


RUN_JSON = {
    "not JSON": b"\x80\x04\x95",
    "a list": b"[]",
    "a key twice": b'{"status": "done", "status": "running"}',
    "not a number": b'{"x": NaN}',
    "too large a number": b'{"x": 1e999}',
    "too many digits": b'{"x": ' + b"9" * 5000 + b"}",
    "nested": b'{"x":' + b"[" * 100_000,
    "nested a little": b'{"x":' + b"[" * 100 + b"]" * 100 + b"}",
    "status is a number": b'{"status": 3}',
    "root is a list": b'{"data_root": ["/"]}',
    "epochs is text": b'{"status": "done", "epochs": "9"}',
}


@pytest.mark.parametrize("kind", RUN_JSON)
def test_damaged_run_json_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run.json").write_bytes(RUN_JSON[kind])
    with pytest.raises(UsageError, match=r"run\.json: damaged"):
        read_facts(tmp_path)


def test_damaged_run_json_is_one_line_of_every_verb(own: Path, refused: Refused) -> None:
    (own / "run.json").write_bytes(RUN_JSON["a list"])
    for command in (["eval", own, "--threads", "1"], ["train", "--resume", own], ["export", own, "--overwrite"]):
        said = refused(2, *command)
        assert f"{own / 'run.json'}: damaged" in said and said.count("\n") == 1


def test_state_that_is_a_pipe_is_skipped(own: Path) -> None:
    """Reading it would wait without end."""
    state = max((own / "checkpoints").glob("step-*"))
    (state / MANIFEST).unlink()
    os.mkfifo(state / MANIFEST)
    with pytest.raises(ArtifactError, match="not a file"):
        read_newest_state(own / "checkpoints")


# Memory and time


def huge(file: Path, start: bytes = b"") -> Path:
    """A file of a terabyte that takes no room: all but its start is a hole."""
    with file.open("wb") as stream:
        stream.write(start)
        stream.truncate(1 << 40)
    return file


def test_huge_files_are_refused_before_they_are_read(own: Path, tmp_path: Path) -> None:
    state = max((own / "checkpoints").glob("step-*"))
    (state / TENSORS).unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    huge(own / "run.json")
    huge(state / TENSORS)
    header = huge(tmp_path / "header.safetensors", struct.pack("<Q", 1 << 39))
    for read in (
        lambda: read_facts(own),
        lambda: read_newest_state(own / "checkpoints"),
        lambda: load_checkpoint(header),
        lambda: load_checkpoint(huge(tmp_path / "zeros.safetensors")),
        lambda: description_in(header),
    ):
        with pytest.raises(ResnetDistError):
            read()
    with pytest.raises(ModelError, match="larger than"):
        Predictor(huge(tmp_path / "m.onnx"))
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


BOMB = """
import resource, sys, time
from export.predict import ImageError, decode
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    decode(sys.argv[1])
except ImageError as error:
    print(error)
print(time.monotonic() - started < 1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000)
"""


def test_decompression_bomb_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    """90 megapixels in 11 KB, in a process of its own, whose memory can be measured."""
    Image.new("1", (9500, 9500)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    done = subprocess.run(
        [sys.executable, "-c", BOMB, tmp_path / "bomb.png"], capture_output=True, text=True, timeout=60
    )
    said, verdict = done.stdout.splitlines()
    assert "more pixels than the limit" in said or "more than the limit" in said
    assert verdict == "True True"


# The readers themselves


def test_bounded_reading(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_bounded(tmp_path / "f", 5) == b"12345"
    with pytest.raises(ValueError, match="larger"):
        read_bounded(tmp_path / "f", 4)
    os.mkfifo(tmp_path / "pipe")
    for path, word in ((tmp_path, "folder"), (tmp_path / "pipe", "not a file"), (Path("/dev/zero"), "not a file")):
        with pytest.raises(ValueError, match=word):
            read_bounded(path, 5)


def test_strict_json_is_json() -> None:
    """What it accepts it reads as the standard library does."""
    random = np.random.default_rng(0)

    def value(depth: int) -> Any:
        kind = int(random.integers(0, 7 if depth else 5))
        plain = [None, True, int(random.integers(-(10**9), 10**9)), float(random.normal()), "é\n\x00\U0001f600"]
        if kind < 5:
            return plain[kind]
        inner = [value(depth - 1) for _ in range(int(random.integers(0, 4)))]
        return inner if kind == 5 else {f"k{i}": item for i, item in enumerate(inner)}

    for _ in range(300):
        made = value(5)
        text = json.dumps(made)
        assert parse_json(text) == json.loads(text) == made
