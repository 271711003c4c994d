"""Weights: from torchvision by name, from a server, from the user's file; nothing in a file is ever executed."""

import gc
import hashlib
import json
import pickle
import random
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from export.predict import Preprocessing, fit, normalise
from resnet_dist.config.schema import ARCHITECTURES, ModelConfig
from resnet_dist.errors import ArtifactError, MachineError, UsageError
from resnet_dist.model import weights
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.model.weights import (
    DTYPES,
    cached_file,
    check_backbone,
    download,
    load_backbone,
    named_weights,
    preprocessing_in,
    preprocessing_of,
    read_tensors,
)

TENSORS = {"conv1.weight": torch.arange(12.0).reshape(3, 4), "fc.bias": torch.ones(2)}
ALL_WEIGHTS = [w for name in ARCHITECTURES for w in torchvision.models.get_model_weights(name)]


def save(file: Path, value: object, legacy: bool = False) -> Path:
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file


# Reading files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t},
        lambda t: {"model": t, "epoch": 3, "lr": [1e-3]},
        lambda t: {f"module.{name}": value for name, value in t.items()},
        lambda t: {"state_dict": {f"module.{name}": value for name, value in t.items()}, "best": 0.5},
    ],
    ids=["plain", "state_dict", "model", "module", "state_dict-module"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_pth_files_of_all_trainers_are_read(tmp_path: Path, wrap: Callable[[Any], Any], legacy: bool) -> None:
    read = read_tensors(save(tmp_path / "w.pth", wrap(dict(TENSORS)), legacy))
    assert list(read) == list(TENSORS)
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())


@pytest.mark.parametrize("format_", ["safetensors", "pth"])
def test_prefixes_of_names_are_removed(tmp_path: Path, format_: str) -> None:
    """Those of DDP, torch.compile, Lightning, in any order, and of parts that were compiled by themselves."""
    plain = {"conv1.weight": torch.zeros(2), "layer1.0.bn1.bias": torch.ones(3), "fc.bias": torch.ones(2)}
    for wrapper in (
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "model.module.module.",
    ):
        for part in ("layer1.", "layer1._orig_mod."):
            wrapped = {wrapper + name.replace("layer1.", part): value for name, value in plain.items()}
            file = tmp_path / f"w.{format_}"
            save_file(wrapped, file) if format_ == "safetensors" else save(file, {"model": {"state_dict": wrapped}})
            read = read_tensors(file)
            assert read.keys() == plain.keys() and all(torch.equal(read[name], plain[name]) for name in plain), wrapper
    twice = {"module.conv1.weight": torch.zeros(2), "conv1.weight": torch.ones(2)}
    save_file(twice, file) if format_ == "safetensors" else save(file, twice)
    with pytest.raises(ArtifactError, match=r"contains conv1\.weight twice, as (module\.)?conv1\.weight and as"):
        read_tensors(file)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "old.pth"])
def test_shapes_are_read_without_values(tmp_path: Path, name: str) -> None:
    """Enough to see whether they fit."""
    made = Architecture.of(ModelConfig(model="resnet18"), 2)
    tensors = {key: value.contiguous() for key, value in build(made).state_dict().items()}
    if name == "w.safetensors":
        save_file(tensors, tmp_path / name)
    else:
        save(tmp_path / name, tensors, legacy=name == "old.pth")
    read = read_tensors(tmp_path / name, "meta")
    assert all(value.is_meta for value in read.values())
    assert len(check_backbone(read, made, name)) == len(tensors) - 2
    with pytest.raises(ArtifactError, match=r"does not fit resnet34.*it fits --model resnet18"):
        check_backbone(read, Architecture.of(ModelConfig(model="resnet34"), 2), name)


def test_shapes_of_safetensors_come_from_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type as it is; one that torch does not have is an error."""
    kinds = [*DTYPES.values()]
    save_file(
        {f"t{i}": torch.zeros((2, 3)[: i % 3], dtype=kind) for i, kind in enumerate(kinds)}, tmp_path / "w.safetensors"
    )
    monkeypatch.delattr(weights, "load_file")
    read = read_tensors(tmp_path / "w.safetensors", "meta")
    for i, kind in enumerate(kinds):
        assert read[f"t{i}"].is_meta and (read[f"t{i}"].dtype, read[f"t{i}"].shape) == (kind, (2, 3)[: i % 3])
    header = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ArtifactError, match="a has the type F8_E8M0"):
        read_tensors(tmp_path / "odd.safetensors", "meta")


def test_saved_parameters_are_read(tmp_path: Path) -> None:
    """`torch.save(model.state_dict())` of a real network."""
    model = torchvision.models.resnet18(num_classes=2)
    read = read_tensors(save(tmp_path / "w.pth", model.state_dict()))
    model.load_state_dict(read, strict=True)
    assert list(read) == list(model.state_dict())


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    read = read_tensors(tmp_path / "w.safetensors")
    assert set(read) == set(TENSORS)
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"state_dict": TENSORS, "hook": m}, lambda m: {"a": m}])
@pytest.mark.parametrize("how", ["torch", "torch-legacy", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_file_is_executed(tmp_path: Path, wrap: Callable[[Malicious], Any], how: str) -> None:
    marker, file = tmp_path / "marker", tmp_path / "w.pth"
    evil = wrap(Malicious(marker))
    if how == "pickle":
        file.write_bytes(pickle.dumps(evil))
    else:
        save(file, evil, legacy=how == "torch-legacy")
    with pytest.raises(ArtifactError, match=r"w\.pth"):
        read_tensors(file)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_malicious_file_is_malicious(tmp_path: Path) -> None:
    """Else the test before would show nothing."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("there", ["nothing", "folder"])
def test_missing_file_is_named(tmp_path: Path, name: str, there: str) -> None:
    if there == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(ArtifactError, match=f"{name}: there is no such"):
        read_tensors(tmp_path / name)


WRONG = {
    "empty": b"",
    "text": b"<html><body>404</body></html>",
    "zip": b"PK\x03\x04 and no more",
    "zeros": bytes(4096),
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_file_without_weights_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name) as error:
        read_tensors(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [3, "text", [torch.ones(2)], torch.ones(2), {"a": 1}, {"state_dict": {"a": [1]}}, {0: torch.ones(2)}]
)
def test_pth_without_a_state_dict_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ArtifactError, match="contains no state dict"):
        read_tensors(save(tmp_path / "w.pth", value))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_file_is_either_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Cut short or with bytes changed: never an exception that is none of ours."""
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(TENSORS, file)
    else:
        save(file, TENSORS, legacy=kind == "legacy")
    whole, chance = file.read_bytes(), random.Random(0)
    refused = 0
    for number in range(300):
        damaged = bytearray(whole)
        if number % 3:
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        else:
            del damaged[chance.randrange(len(whole)) :]
        file.write_bytes(damaged)
        try:
            read_tensors(file)
        except ArtifactError:
            refused += 1
    assert refused >= 100


# Into a network


def network(name: str, head: str = "linear", stem: str = "standard") -> tuple[nn.Module, Architecture]:
    made = Architecture.of(ModelConfig(model=name, head=head, stem=stem), num_classes=3)
    return build(made), made


def without_head(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("fc.")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def pretrained(name: str) -> dict[str, torch.Tensor]:
    """A state dict as torchvision publishes it: 1000 classes, BatchNorm with statistics."""
    torch.manual_seed(7)
    model = getattr(torchvision.models, name)()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(100)
    tensors: dict[str, torch.Tensor] = model.state_dict()
    return tensors


@pytest.mark.parametrize("head", ["linear", "mlp", "concat-pool"])
def test_backbone_is_copied_and_the_head_stays_new(head: str) -> None:
    """Weights and statistics; the old head has other classes."""
    model, made = network("resnet18", head)
    before = {name: value.clone() for name, value in model.fc.state_dict().items()}
    tensors = pretrained("resnet18")
    load_backbone(model, tensors, made, "w.pth")
    assert same(without_head(model), {n: t for n, t in tensors.items() if not n.startswith("fc.")})
    assert same(dict(model.fc.state_dict()), before)


def test_head_of_equal_shape_is_not_copied_either() -> None:
    """It belongs to other classes, though there are as many of them."""
    model, made = network("resnet18")
    other, _ = network("resnet18")
    before = model.fc.weight.clone()
    load_backbone(model, other.state_dict(), made, "w.pth")
    assert torch.equal(model.fc.weight, before)


def test_backbone_alone_is_enough() -> None:
    model, made = network("resnet18")
    tensors = {name: value for name, value in pretrained("resnet18").items() if not name.startswith("fc.")}
    load_backbone(model, tensors, made, "w.pth")
    assert same(without_head(model), tensors)


def test_older_files_have_no_batch_counters() -> None:
    """torch before 0.4.1 did not write num_batches_tracked."""
    model, made = network("resnet18")
    tensors = {n: t for n, t in pretrained("resnet18").items() if not n.endswith("num_batches_tracked")}
    load_backbone(model, tensors, made, "w.pth")
    assert torch.equal(model.bn1.running_mean, tensors["bn1.running_mean"])


@pytest.mark.parametrize(
    ("given", "wanted"), [("resnet34", "resnet18"), ("resnet18", "resnet34"), ("resnet50", "resnet18")]
)
def test_weights_of_another_architecture_are_refused_and_it_is_named(given: str, wanted: str) -> None:
    """And nothing of them is copied."""
    model, made = network(wanted)
    before = without_head(model)
    with pytest.raises(ArtifactError, match=f"does not fit {wanted}: .*; it fits --model {given}$"):
        load_backbone(model, pretrained(given), made, "w.pth")
    assert same(without_head(model), before)


@pytest.mark.parametrize(("given", "wanted"), [("standard", "small"), ("small", "standard")])
def test_small_and_standard_stem_differ(given: str, wanted: str) -> None:
    tensors = network("resnet18", stem=given)[0].state_dict()
    model, made = network("resnet18", stem=wanted)
    advice = "--model resnet18" + (" --stem small" if given == "small" else "")
    with pytest.raises(ArtifactError, match=f"conv1.weight has shape .*; it fits {advice}$"):
        load_backbone(model, tensors, made, "w.pth")


def test_small_stem_is_loaded_into_a_small_stem() -> None:
    given = network("resnet18", stem="small")[0]
    model, made = network("resnet18", stem="small")
    load_backbone(model, given.state_dict(), made, "w.pth")
    assert same(without_head(model), without_head(given))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("layer2.0.conv1.weight"), "layer2.0.conv1.weight is missing"),
        (lambda t: t.update({"layer9.weight": torch.ones(1)}), "layer9.weight is unknown"),
        (lambda t: t.update({"bn1.bias": torch.ones(5)}), r"bn1.bias has shape \(5,\) instead of \(64,\)"),
        (lambda t: t.clear(), "conv1.weight is missing .and 99 more"),
    ],
)
def test_error_names_the_tensor_that_does_not_fit(change: Callable[[dict[str, torch.Tensor]], Any], said: str) -> None:
    """Without advice where it fits nothing."""
    model, made = network("resnet18")
    tensors = pretrained("resnet18")
    change(tensors)
    with pytest.raises(ArtifactError, match=said) as error:
        load_backbone(model, tensors, made, "my.pth")
    assert "my.pth" in str(error.value) and "it fits" not in str(error.value)


# By name


@pytest.mark.parametrize("weights", ALL_WEIGHTS, ids=str)
def test_named_weights_are_torchvisions(weights: Any) -> None:
    name = next(n for n in ARCHITECTURES if weights in torchvision.models.get_model_weights(n))
    assert named_weights(ModelConfig(model=name, weights=weights.name)) is weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_weights_are_torchvisions_default(name: str) -> None:
    expected = torchvision.models.get_model_weights(name).DEFAULT
    assert named_weights(ModelConfig(model=name, weights="DEFAULT")) is expected


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_unavailable_weights_are_an_error_that_lists_the_available_ones(name: str) -> None:
    with pytest.raises(UsageError, match=f"IMAGENET1K_V2: {name} has IMAGENET1K_V1"):
        named_weights(ModelConfig(model=name, weights="IMAGENET1K_V2"))


@pytest.mark.parametrize("text", ["none", "weights.pth", "/somewhere/DEFAULT"])
def test_none_and_files_are_not_named_weights(text: str) -> None:
    assert named_weights(ModelConfig(weights=text)) is None


@pytest.mark.parametrize("weights", ALL_WEIGHTS, ids=str)
@pytest.mark.parametrize("size", [(300, 451), (640, 337), (224, 224), (57, 90)])
def test_preprocessing_of_weights_is_torchvisions_transform(weights: Any, size: tuple[int, int]) -> None:
    """Pixel for pixel, on images of any shape."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    spec = preprocessing_of(weights)
    ours = torch.from_numpy(normalise(fit(image, spec), spec)).permute(2, 0, 1)
    torch.testing.assert_close(ours, weights.transforms()(image), rtol=0, atol=1e-6)


def test_preprocessing_without_weights_is_that_of_imagenet() -> None:
    assert preprocessing_of(None) == preprocessing_of(torchvision.models.ResNet50_Weights.IMAGENET1K_V1)


# What a checkpoint says of its preprocessing


SPEC = Preprocessing(img_size=64, resize_mode="pad", resize=64, mean=(0.1, 0.2, 0.3))


def checkpoint(file: Path, metadata: dict[str, str] | None) -> Path:
    save_file(TENSORS, file, metadata)
    return file


def test_checkpoint_has_its_own_preprocessing(tmp_path: Path) -> None:
    metadata = {"resnet_dist": json.dumps({"preprocessing": SPEC.to_dict()})}
    assert preprocessing_in(checkpoint(tmp_path / "best.safetensors", metadata)) == SPEC


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_safetensors_have_imagenet_preprocessing(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    assert preprocessing_in(checkpoint(tmp_path / "w.safetensors", metadata)) == Preprocessing()


def test_pth_files_have_imagenet_preprocessing(tmp_path: Path) -> None:
    assert preprocessing_in(save(tmp_path / "w.pth", TENSORS)) == Preprocessing()


def changed(**values: Any) -> str:
    return json.dumps({"preprocessing": SPEC.to_dict() | values})


@pytest.mark.parametrize(
    "stored",
    [
        "no json",
        "[" * 100_000,
        "null",
        "[]",
        "{}",
        '{"preprocessing": null}',
        '{"preprocessing": []}',
        '{"preprocessing": "crop"}',
        '{"preprocessing": {}}',
        changed(img_size=0),
        changed(img_size="64"),
        changed(img_size=None),
        changed(resize_mode=[]),
        changed(interpolation=[["bilinear"]]),
        changed(mean=0.5),
        changed(mean=[0.5, 0.5]),
        changed(std=[1, 1, 0]),
        changed(alpha="ignore"),
        changed(surprise=1),
    ],
    ids=lambda text: text[-40:],
)
def test_damaged_description_is_refused(tmp_path: Path, stored: str) -> None:
    file = checkpoint(tmp_path / "best.safetensors", {"resnet_dist": stored})
    with pytest.raises(ArtifactError, match=r"best\.safetensors"):
        preprocessing_in(file)


@pytest.mark.parametrize("content", [None, b"", b"{}", bytes(100)])
def test_unreadable_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "best.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"best\.safetensors"):
        preprocessing_in(file)


# From a server


CONTENT = b"weights" * 1000
NAME = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Files(BaseHTTPRequestHandler):
    """Serves CONTENT under /good/, half of it under /cut/, a page under /bad/, and what is no HTTP under /noise/."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith("/noise/"):
            self.wfile.write(b"this is not HTTP\r\n\r\n")
        elif self.path.startswith(("/good/", "/bad/", "/cut/")):
            body = b"<html>log in first</html>" if self.path.startswith("/bad/") else CONTENT
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path.startswith("/cut/") else body)
        else:
            self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server in a thread, which remembers what it was asked for."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    made.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()
    gc.collect()  # a connection that was left open is this test's fault, not the next one's


@pytest.fixture(autouse=True)
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and no proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "home"


def url(server: ThreadingHTTPServer, folder: str, name: str = NAME) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{folder}/{name}"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_download_goes_to_torchs_cache(server: ThreadingHTTPServer, torch_home: Path) -> None:
    file = download(url(server, "good"))
    assert file == torch_home / "hub" / "checkpoints" / NAME
    assert file.read_bytes() == CONTENT
    assert files_in(torch_home) == [NAME]


def test_cached_file_is_not_downloaded_again(server: ThreadingHTTPServer) -> None:
    download(url(server, "good"))
    download(url(server, "good"))
    assert server.asked == [f"/good/{NAME}"]  # type: ignore[attr-defined]


def test_damaged_cache_is_refused(server: ThreadingHTTPServer) -> None:
    """It says which file to remove, and leaves it to the user."""
    file = download(url(server, "good"))
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(ArtifactError, match=f"{NAME}: its sha256 .* remove it"):
        download(url(server, "good"))
    assert file.read_bytes() == CONTENT[:-1]


@pytest.mark.parametrize("folder", ["bad", "cut"])
def test_download_with_another_hash_is_refused(server: ThreadingHTTPServer, torch_home: Path, folder: str) -> None:
    """A log-in page in place of the file, or half of it; nothing of it stays."""
    with pytest.raises((ArtifactError, MachineError), match=NAME):
        download(url(server, folder))
    assert files_in(torch_home) == []


@pytest.mark.parametrize("folder", ["nowhere", "noise"])
def test_failed_download_says_what_to_do(server: ThreadingHTTPServer, torch_home: Path, folder: str) -> None:
    address = url(server, folder)
    with pytest.raises(MachineError) as error:
        download(address)
    for word in (address, str(cached_file(address)), "--weights FILE", "--weights none"):
        assert word in str(error.value)
    assert "\n" not in str(error.value) and files_in(torch_home) == []


def test_missing_network_says_what_to_do() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/{NAME}"
        with pytest.raises(MachineError) as error:
            download(address)
    for word in (address, "refused", str(cached_file(address)), "--weights FILE", "--weights none"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_file_copied_into_the_cache_is_used(torch_home: Path) -> None:
    """The way out that the error names."""
    address = f"http://127.0.0.1:1/{NAME}"
    cached_file(address).parent.mkdir(parents=True)
    cached_file(address).write_bytes(CONTENT)
    assert download(address).read_bytes() == CONTENT


def test_unwritable_cache_is_a_machine_error(server: ThreadingHTTPServer, torch_home: Path) -> None:
    torch_home.write_text("a file where the folder should be")
    with pytest.raises(MachineError, match="--weights FILE"):
        download(url(server, "good"))


@pytest.mark.parametrize("folder", ["good", "bad", "nowhere"])
def test_download_restores_the_socket_timeout(server: ThreadingHTTPServer, folder: str) -> None:
    before = socket.getdefaulttimeout()
    try:
        download(url(server, folder))
    except (ArtifactError, MachineError):
        assert folder != "good"
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("weights", ALL_WEIGHTS, ids=str)
def test_torchvisions_file_names_contain_a_hash(weights: Any) -> None:
    """The download trusts it: a file of that name with other content is refused."""
    file = cached_file(weights.url)
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    with pytest.raises(ArtifactError, match="sha256"):
        download(weights.url)


def test_real_weights_load(shared: Path) -> None:
    """A published resnet18, read from the disk, is torchvision's network bit for bit."""
    file = shared / "weights" / "resnet18.safetensors"
    model, made = network("resnet18")
    load_backbone(model, read_tensors(file), made, str(file))
    plain = torchvision.models.resnet18()
    plain.load_state_dict(read_tensors(file), strict=True)
    assert same(without_head(model), without_head(plain))
