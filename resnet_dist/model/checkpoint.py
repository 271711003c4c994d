"""Checkpoints: tensors under torchvision's names, and a description in one metadata key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from export.predict import Preprocessing, canonical_json
from resnet_dist import __version__
from resnet_dist.errors import ArtifactError
from resnet_dist.files.header import METADATA_KEY, description_in
from resnet_dist.files.run import FORMAT_VERSION, write_atomically
from resnet_dist.model.resnet import Architecture, build, empty
from resnet_dist.model.weights import check_finite, load_backbone
from resnet_dist.runtime.wording import similar_path

MAX_CLASSES, MAX_NAME = 100_000, 1024  # the predictor has the same limits


@dataclass(frozen=True, kw_only=True)
class Description:
    """The description in a checkpoint: everything except the tensors.

    `config`: the resolved config without the output folder. `score`: the validation metrics of this epoch.
    `weights_kind`: "raw" or "ema". `origin`: where the parts of foreign weights come from; not stored in a checkpoint.
    """

    architecture: Architecture
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    config: Mapping[str, Any]
    epoch: int
    score: Mapping[str, float]
    weights_kind: str
    origin: Mapping[str, str] | None = None

    def to_json(self) -> str:
        """Canonical JSON without time, host or path: equal states give equal bytes."""
        return canonical_json(
            {
                "format_version": FORMAT_VERSION,
                **self.architecture.to_dict(),
                "classes": list(self.classes),
                "preprocessing": self.preprocessing.to_dict(),
                "config": self.config,
                "epoch": self.epoch,
                "score": dict(self.score),
                "weights_kind": self.weights_kind,
                "versions": {"resnet_dist": __version__, "torch": torch.__version__},
            }
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Description":
        """From the stored form. Raises ValueError, or KeyError if a field is missing."""
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError("this version of resnet-dist cannot read its format_version")
        classes = values["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
            raise ValueError("`classes` must be a list of names")
        if not 0 < len(classes) <= MAX_CLASSES or max(map(len, classes)) > MAX_NAME:
            raise ValueError(f"`classes` must hold 1 to {MAX_CLASSES} names of at most {MAX_NAME} characters")
        if len(set(classes)) != len(classes):
            raise ValueError("`classes` contains a name twice")
        if not isinstance(values["config"], dict) or not _is_score(values["score"]):
            raise ValueError("`config` must be an object, and `score` an object of numbers")
        if type(values["epoch"]) is not int or values["weights_kind"] not in ("raw", "ema"):
            raise ValueError("`epoch` must be an integer and `weights_kind` must be 'raw' or 'ema'")
        return cls(
            architecture=Architecture.from_dict(values, len(classes)),
            classes=tuple(classes),
            preprocessing=Preprocessing.from_dict(values["preprocessing"]),
            config=values["config"],
            epoch=values["epoch"],
            score=values["score"],
            weights_kind=values["weights_kind"],
        )


def save_best(file: Path, model: nn.Module, description: Description) -> None:
    """Write weights and their description. Equal states give equal bytes. Raises MachineError."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(file, save(plain, metadata={METADATA_KEY: description.to_json()}))


def _hint(file: Path) -> str:
    """Why there is no such checkpoint: there is no such run, or the folder is not a run."""
    run = file.parent.parent
    if file.parent.name != "checkpoints":
        return similar_path(file)
    if not run.exists():
        return similar_path(run) or f", because there is no folder {run}"
    return "" if (run / "run.json").exists() else f", because {run} is not a run folder"


def load_checkpoint(file: Path) -> tuple[nn.Module, Description]:
    """The model of a checkpoint, in evaluation mode on the CPU, and its description.

    Nothing is unpickled. Names, shapes and types must match the description, and all values must be finite; otherwise
    raises ArtifactError.
    """
    if not file.is_file():
        raise ArtifactError(f"{file}: there is no such checkpoint{_hint(file)}")
    values = description_in(file)
    if values is None:
        raise ArtifactError(f"{file}: not written by resnet-dist (no '{METADATA_KEY}' in its metadata)")
    description = _described(file, values)
    try:
        with safe_open(file, framework="pt") as opened:
            _check(file, opened, empty(description.architecture))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: not a safetensors file ({error})") from None
    check_finite(tensors, str(file))
    model = build(description.architecture)
    model.load_state_dict(tensors)
    return model.eval(), description


def start_from(file: Path, model: nn.Module, architecture: Architecture, classes: Sequence[str]) -> str:
    """Load the weights of an old checkpoint into a new network: the backbone, and the head if head and classes match.

    Returns a line that says which. Raises ArtifactError if the checkpoint is damaged or has another backbone.
    """
    old, described = load_checkpoint(file)
    tensors = old.state_dict()
    load_backbone(model, tensors, architecture, str(file))
    if described.classes != tuple(classes):
        common = len(set(described.classes) & set(classes))
        return f"weights: backbone of {file}, new head ({common} of its {len(described.classes)} classes are also here)"
    before, now = (" ".join(map(str, (a.head, *a.head_hidden))) for a in (described.architecture, architecture))
    if before != now:
        return f"weights: backbone of {file}, new head (it had {before}, this run has {now})"
    model.load_state_dict(tensors)
    return f"weights: backbone and head of {file}"


def _is_score(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())


def _described(file: Path, values: Mapping[str, Any]) -> Description:
    try:
        return Description.from_dict(values)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{file}: its description is damaged: {reason}") from None


def _check(file: Path, opened: Any, model: nn.Module) -> None:
    """Check that the file holds exactly the tensors of the model, with its shapes and types. Raises ArtifactError."""
    wanted = model.state_dict()
    names = set(opened.keys())
    if names != set(wanted):
        differing: Sequence[str] = sorted(names ^ set(wanted))
        raise ArtifactError(f"{file}: its tensors differ from those of the described network, such as {differing[0]!r}")
    dtypes = {torch.float32: "F32", torch.int64: "I64"}
    for name, tensor in wanted.items():
        stored = opened.get_slice(name)
        if tuple(stored.get_shape()) != tuple(tensor.shape) or stored.get_dtype() != dtypes[tensor.dtype]:
            raise ArtifactError(f"{file}: {name} has another shape or type than in the described network")
