"""best.safetensors: the same bytes for the same state, loadable by others, and refused when it is not what it says."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export.predict import Preprocessing
from resnet_dist.errors import ArtifactError
from resnet_dist.model.checkpoint import Description, load_checkpoint, save_best
from resnet_dist.model.resnet import Architecture, build
from tests.conftest import write_image

CLASSES = ("a b", "ü", "z")


def described(head: str = "linear", stem: str = "standard", name: str = "resnet18") -> Description:
    hidden = () if head == "linear" else (16,)
    architecture = Architecture(name=name, stem=stem, head=head, head_hidden=hidden, dropout=0.1, num_classes=3)
    return Description(
        architecture=architecture,
        classes=CLASSES,
        preprocessing=Preprocessing(),
        config={"run": {"seed": 1}},
        epoch=3,
        score={"top1": 0.5, "loss": 1.25},
        weights_kind="raw",
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "best.safetensors"
    torch.manual_seed(0)
    save_best(file, build(described().architecture), described())
    return file


@pytest.mark.parametrize("head", ["linear", "mlp", "concat-pool"])
@pytest.mark.parametrize("stem", ["standard", "small"])
def test_round_trip(tmp_path: Path, head: str, stem: str) -> None:
    description = described(head, stem)
    model = build(description.architecture).eval()
    save_best(tmp_path / "x.safetensors", model, description)
    loaded, found = load_checkpoint(tmp_path / "x.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert found == description
    assert torch.equal(loaded(x), model(x))


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    model, description = load_checkpoint(saved)
    save_best(tmp_path / "again.safetensors", model, description)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_torchvision_and_timm_load_it_as_it_is(saved: Path) -> None:
    tensors = load_file(saved)
    model, _ = load_checkpoint(saved)
    x = torch.randn(2, 3, 64, 64)
    for other in (torchvision.models.resnet18(num_classes=3), timm.create_model("resnet18", num_classes=3)):
        other.load_state_dict(tensors)
        torch.testing.assert_close(other.eval()(x), model(x), rtol=1e-4, atol=1e-5)


def test_one_metadata_key_without_time_or_path(saved: Path) -> None:
    with safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
    assert list(metadata) == ["resnet_dist"]
    values = json.loads(metadata["resnet_dist"])
    wanted = "format_version architecture stem head classes preprocessing config epoch score weights_kind versions"
    assert set(values) == set(wanted.split())
    assert json.dumps(values, sort_keys=True, separators=(",", ":")) == metadata["resnet_dist"]
    assert str(saved.parent) not in metadata["resnet_dist"]


def test_file_mode_follows_umask(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_trained_checkpoint_contains_no_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_dist.config.stored import portable
    from tests.training.helpers import config_of

    weights = tmp_path / "secret-place" / "w.safetensors"
    cfg = config_of(folder, "--val-dir", folder / "val", "--weights", weights, "--class-weights", tmp_path / "c.toml")
    text = json.dumps(portable(cfg), default=str)
    assert str(tmp_path) not in text and str(folder) not in text
    assert "w.safetensors" in text


def rewritten(saved: Path, to: Path, **changes: object) -> Path:
    """The checkpoint with other values in its description."""
    with safe_open(saved, framework="pt") as opened:
        values = json.loads(opened.metadata()["resnet_dist"])
    save_file(load_file(saved), to, metadata={"resnet_dist": json.dumps({**values, **changes})})
    return to


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "resnet34"}, "its tensors differ from those"),
        ({"architecture": "../../evil"}, "unknown architecture"),
        ({"stem": "small"}, "conv1.weight has another shape"),
        ({"head": {"name": "mlp", "hidden": [8], "dropout": 0.0}}, "its tensors differ from those"),
        ({"head": "linear"}, "unknown head"),
        ({"classes": ["a", "b"]}, "fc.weight has another shape"),
        ({"classes": ["a", "a", "b"]}, "a name twice"),
        ({"classes": "abc"}, "must be a list of names"),
        ({"format_version": 99}, "format_version"),
        ({"preprocessing": {}}, "preprocessing"),
        ({"preprocessing": None}, "damaged"),
    ],
)
def test_a_wrong_description_is_refused(saved: Path, tmp_path: Path, changes: dict, said: str) -> None:  # type: ignore[type-arg]
    file = rewritten(saved, tmp_path / "x.safetensors", **changes)
    with pytest.raises(ArtifactError, match=re.escape(said)) as caught:
        load_checkpoint(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_refused(saved: Path, tmp_path: Path) -> None:
    model, description = load_checkpoint(saved)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")  # type: ignore[index, union-attr]
    save_best(tmp_path / "x.safetensors", model, description)
    with pytest.raises(ArtifactError, match=r"fc.weight contains values that are not finite"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    """A foreign safetensors file, a truncated one, an image, a folder, nothing at all."""
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(saved.read_bytes()[:-100])
    write_image(tmp_path / "image.png", seed=0)
    for file in (foreign, truncated, tmp_path / "image.png", tmp_path, tmp_path / "nothing"):
        with pytest.raises(ArtifactError, match=re.escape(str(file))):
            load_checkpoint(file)
