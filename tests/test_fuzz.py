"""Whatever bytes a file holds: a value of the right kind or an error of ours, never another exception."""

import io
import json
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from export.predict import ImageError, Preprocessing, decode
from resnet_dist.cli.parser import parse
from resnet_dist.config.schema import DataConfig, TrainConfig
from resnet_dist.data.decode import load_fitted, load_whole
from resnet_dist.data.exclude import read_paths
from resnet_dist.data.index import ImageTable, PathTable, read_index
from resnet_dist.errors import ArtifactError, DataError, UsageError
from resnet_dist.files.header import description_in, network_of
from resnet_dist.files.reading import parse_json
from resnet_dist.files.run import MANIFEST, read_facts
from resnet_dist.model.checkpoint import Description, load_checkpoint, save_best
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.model.weights import preprocessing_in, read_tensors
from resnet_dist.training.state import FACTS, TENSORS, State, read_newest_state, write_state

# The same examples every time, so that the suite is no lottery; more of them: --hypothesis-seed and a larger number.
FEW = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's and torch's words on damaged files

EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "cut", "insert", "end"]), st.binary(max_size=6)
)
EDITS = st.lists(EDIT, min_size=1, max_size=6)


def edited(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """Bytes that are overwritten, taken out, put in, or cut off, at shares of the length."""
    changed = bytearray(data)
    for place, kind, value in edits:
        start = int(place * len(changed))
        end = {"set": start + len(value), "cut": start + 1 + 8 * len(value), "insert": start, "end": len(changed)}[kind]
        changed[start:end] = value if kind in ("set", "insert") else b""
    return bytes(changed)


# Images


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
EXIF = Image.Exif()
EXIF[0x0112] = 6
IMAGES = [
    encoded(RGB, "JPEG"),
    encoded(RGB, "JPEG", progressive=True, exif=EXIF),
    encoded(RGB.convert("L"), "JPEG"),
    encoded(RGB.convert("CMYK"), "JPEG"),
    encoded(RGB.convert("RGBA"), "PNG"),
    encoded(RGB.quantize(9), "PNG", transparency=1),
    encoded(RGB, "WEBP"),
    encoded(RGB, "BMP"),
    encoded(RGB, "TIFF", compression="tiff_deflate"),
    encoded(RGB.convert("1"), "PPM"),
    encoded(RGB.quantize(9), "GIF"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(data=st.one_of(st.builds(edited, st.sampled_from(IMAGES), EDITS), st.binary(max_size=200)))
@settings(FEW, max_examples=400)
def test_images(place: Path, data: bytes) -> None:
    """Training's ways to an image agree with the predictor: on the pixels, and on what is not an image."""
    (place / "x.jpg").write_bytes(data)
    table = ImageTable(place, PathTable(["x.jpg"]), np.zeros(1, np.int64))
    spec = Preprocessing(img_size=16, resize=16, resize_mode="squash")
    try:
        expected = np.asarray(decode(data))
    except ImageError:
        for load in (lambda: load_whole(table, 0), lambda: load_fitted(table, 0, spec)):
            with pytest.raises(DataError, match=r"x\.jpg: "):
                load()
    else:
        assert np.array_equal(load_whole(table, 0), expected)
        assert load_fitted(table, 0, spec).shape == (16, 16, 3)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> bytes:
    made = Architecture(name="resnet18", stem="small", head="mlp", head_hidden=(3,), dropout=0.0, num_classes=2)
    described = Description(
        architecture=made,
        classes=("a", "b"),
        preprocessing=Preprocessing(),
        config={"run": {"seed": 0}},
        epoch=1,
        score={"top1": 0.5},
        weights_kind="raw",
    )
    save_best(place / "best.safetensors", build(made), described)
    return (place / "best.safetensors").read_bytes()


@given(edits=EDITS)
@FEW
def test_checkpoint_headers(place: Path, checkpoint: bytes, edits: list[tuple[float, str, bytes]]) -> None:
    """The header changes, with a length that fits; the tensors after it stay."""
    (length,) = struct.unpack("<Q", checkpoint[:8])
    header = edited(checkpoint[8 : 8 + length], edits)
    file = place / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + checkpoint[8 + length : 8 + length + 4096])
    for read in (load_checkpoint, description_in, network_of, preprocessing_in, read_tensors):
        try:
            read(file)  # type: ignore[operator]
        except ArtifactError as error:
            assert str(file) in str(error) and "\n" not in str(error)


DESCRIPTION_KEYS = (
    "architecture",
    "stem",
    "head",
    "classes",
    "preprocessing",
    "config",
    "epoch",
    "score",
    "weights_kind",
)
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(changes=st.dictionaries(st.sampled_from(DESCRIPTION_KEYS), JSON_VALUE, min_size=1, max_size=3))
@FEW
def test_descriptions(place: Path, checkpoint: bytes, changes: dict[str, Any]) -> None:
    """Any JSON in the place of any part of the description."""
    (length,) = struct.unpack("<Q", checkpoint[:8])
    values = json.loads(json.loads(checkpoint[8 : 8 + length])["__metadata__"]["resnet_dist"]) | changes
    file = place / "y.safetensors"
    file.write_bytes(save({"fc.3.bias": torch.zeros(2)}, {"resnet_dist": json.dumps(values)}))
    with pytest.raises(ArtifactError, match=r"y\.safetensors"):
        load_checkpoint(file)  # which lacks all other tensors
    for read in (network_of, preprocessing_in):
        try:
            read(file)  # type: ignore[operator]
        except ArtifactError as error:
            assert str(file) in str(error)


# States and facts


@pytest.fixture(scope="module")
def state(place: Path) -> dict[str, bytes]:
    (place / "states").mkdir()
    facts = {"state": State().to_dict(), "processes": 1}
    written = write_state(place / "states", {"model/a": torch.ones(5)}, facts, keep=1)
    return {name: (written / name).read_bytes() for name in (TENSORS, FACTS, MANIFEST)}


@given(name=st.sampled_from([TENSORS, FACTS, MANIFEST]), edits=EDITS, sealed=st.booleans())
@FEW
def test_states(
    place: Path, state: dict[str, bytes], name: str, edits: list[tuple[float, str, bytes]], sealed: bool
) -> None:
    """A damaged file of a state, and a damaged one under a manifest that fits it."""
    contents = {**state, name: edited(state[name], edits)}
    if sealed and name != MANIFEST:
        digests = {part: sha256(contents[part]).hexdigest() for part in (TENSORS, FACTS)}
        contents[MANIFEST] = json.dumps(digests).encode()
    folder = next((place / "states").glob("step-*"))
    for part, data in contents.items():
        (folder / part).write_bytes(data)
    try:
        tensors, facts, _ = read_newest_state(place / "states")
    except ArtifactError as error:
        assert str(place / "states") in str(error)
    else:
        assert State.from_dict(facts["state"]).steps_done >= 0 and all(
            isinstance(t, torch.Tensor) for t in tensors.values()
        )


@given(facts=st.dictionaries(st.sampled_from(list(State().to_dict())), JSON_VALUE, min_size=1, max_size=3))
@FEW
def test_state_of_any_json(facts: dict[str, Any]) -> None:
    """What State.from_dict takes can be gone on with; what it refuses it refuses as `read_newest_state` expects."""
    try:
        made = State.from_dict(State().to_dict() | facts)
    except (ValueError, KeyError, TypeError):
        return
    assert made.elapsed() >= made.seconds and made.steps_done + made.epochs_done + made.step_in_epoch >= 0


FACTS_TEXT = json.dumps(
    {"status": "done", "exit_code": 0, "epochs": 3, "data_root": "/d", "best": {"top1": 0.5}}
).encode()


@given(data=st.one_of(st.builds(edited, st.just(FACTS_TEXT), EDITS), st.binary(max_size=60)))
@FEW
def test_run_json(place: Path, data: bytes) -> None:
    (place / "run.json").write_bytes(data)
    try:
        facts = read_facts(place)
    except UsageError as error:
        assert str(place / "run.json") in str(error)
    else:
        assert isinstance(facts.get("epochs", 0), int) and isinstance(facts.get("status", ""), str)


@given(text=st.one_of(st.text(max_size=60), JSON_VALUE.map(json.dumps), st.binary(max_size=60)))
@FEW
def test_strict_json(text: str | bytes) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value


# Settings and lists

TOML = (
    b'recipe = "discriminative"\n[data]\nbatch_size = 8\nworkers = 0\n[optim]\nlr = 1e-3\nlr_groups = {head = 0.1}\n'
    b'[schedule]\nlr_milestones = ["3", "20steps"]\n[run]\nsave_every = "2epochs"\ntracker = ["a"]\n'
    b'[[phase]]\nepochs = 1\ntrainable = "head"\n[[phase]]\ntrainable = "all -batchnorm"\n'
)


@given(data=st.one_of(st.builds(edited, st.just(TOML), EDITS), st.binary(max_size=60)))
@FEW
def test_toml(place: Path, data: bytes) -> None:
    (place / "c.toml").write_bytes(data)
    try:
        made = parse(TrainConfig, ["photos", "-c", str(place / "c.toml")], "resnet-dist train")
    except UsageError as error:
        assert error.problems and all(isinstance(line, str) and line for line in error.problems)
    except ArtifactError as error:  # an init_from that came about
        assert "init" in data.decode(errors="replace") and str(error)
    else:
        assert list(made.problems()) == []


@given(
    words=st.lists(
        st.one_of(
            st.sampled_from(["--lr", "--epochs=", "-b", "--phase", "-c", "x", "--no-ema", "--"]), st.text(max_size=9)
        ),
        max_size=5,
    )
)
@FEW
def test_command_lines(words: list[str]) -> None:
    """`--help`, which leaves, apart."""
    if {"-h", "--help"} & set(words) or any(word.startswith(("-h", "--h")) for word in words):
        return
    try:
        parse(TrainConfig, words, "resnet-dist train")
    except UsageError as error:
        assert error.problems


MANIFEST_TEXT = b"path,label,split\n" + b"".join(
    f'"{name}/{i}.png",{name},{part}\n'.encode() for name in "ab" for i, part in enumerate(("train", "train", "val"))
)


@given(data=st.one_of(st.builds(edited, st.just(MANIFEST_TEXT), EDITS), st.binary(max_size=60)))
@FEW
def test_manifests_and_lists(place: Path, data: bytes) -> None:
    (place / "m.csv").write_bytes(data)
    readers: tuple[Callable[[], Any], ...] = (
        lambda: read_index(DataConfig(data=str(place / "m.csv"))),
        lambda: read_paths(place / "m.csv"),
    )
    for read in readers:
        try:
            read()
        except DataError as error:
            assert str(error)
