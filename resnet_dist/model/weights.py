"""Pretrained weights: from torchvision, verified by hash, or from a file, loaded without unpickling code."""

import hashlib
import http.client
import pickle  # noqa: TID251 - the name of the error that torch.load raises
import re
import socket
import struct
import urllib.error
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from export.predict import Preprocessing
from resnet_dist.config.schema import ARCHITECTURES, ModelConfig
from resnet_dist.errors import ArtifactError, MachineError, UsageError
from resnet_dist.files.header import description_in
from resnet_dist.files.weights_file import located
from resnet_dist.model.resnet import Architecture, empty, stage_of
from resnet_dist.runtime.wording import similar_path

MAX_WEIGHTS = 1 << 32  # bytes; four times a resnet152 with its optimizer state
DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
HOLDERS = ("state_dict", "model_state_dict", "model")  # where other trainers' checkpoints store the state dict
WRAPPERS = ("module", "_orig_mod", "model")  # prefixes that DDP, torch.compile and trainers put before names
NAMES = ("DEFAULT", "IMAGENET1K_V1", "IMAGENET1K_V2")
Tensors = Mapping[str, torch.Tensor]
DTYPES = {  # by their names in the header of a safetensors file
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
# Exceptions that torch.load raises on damaged files.
_DAMAGED_PICKLE = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, AssertionError, struct.error)
DAMAGED = (*_DAMAGED_PICKLE, RuntimeError, ValueError, TypeError, OSError)


def named_weights(cfg: ModelConfig) -> torchvision.models.WeightsEnum | None:
    """torchvision's entry of the weights in `cfg`; None for `none` and for a file.

    Raises UsageError if this architecture has no such weights.
    """
    if cfg.weights not in NAMES:
        return None
    available = torchvision.models.get_model_weights(cfg.model)
    if cfg.weights not in available.__members__:
        raise UsageError(f"--weights {cfg.weights}: {cfg.model} has {', '.join(available.__members__)}")
    return available[cfg.weights]


def weights_file(cfg: ModelConfig) -> Path:
    """The file of the pretrained weights in `cfg`, downloaded if necessary. Raises as `download` and `located` do."""
    named = named_weights(cfg)
    return download(named.url) if named is not None else located(cfg.weights)


def preprocessing_of(weights: torchvision.models.WeightsEnum | None) -> Preprocessing:
    """The preprocessing that the weights were trained with; the usual one for ImageNet if it is unknown."""
    if weights is None:
        return Preprocessing()
    transforms = weights.transforms()
    return Preprocessing(
        img_size=transforms.crop_size[0],
        resize=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def preprocessing_in(file: Path) -> Preprocessing:
    """The preprocessing in the metadata of a resnet-dist checkpoint; ImageNet's for any other file."""
    described = description_in(file) if file.suffix == ".safetensors" else None
    if described is None:
        return Preprocessing()
    try:
        return Preprocessing.from_dict(described.get("preprocessing", {}))
    except ValueError as error:
        raise ArtifactError(f"{file}: its description is damaged: {error}") from None


def cached_file(url: str) -> Path:
    """The file in torch's cache for the download of `url`. Follows TORCH_HOME."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def download(url: str) -> Path:
    """The file of `url`, from torch's cache or downloaded into it. Its hash is checked in both cases.

    The file name contains the first 8 hex digits of the sha256. Raises MachineError, with what to do instead, if
    network or disk fail, and ArtifactError if the hash does not match.
    """
    file = cached_file(url)
    match = re.search(r"-([0-9a-f]{8,})\.", file.name)
    prefix = match[1] if match else None
    if file.exists():
        if prefix and not sha256_of(file).startswith(prefix):
            raise ArtifactError(f"{file}: its sha256 does not begin with {prefix}; remove it to download it again")
        return file
    old_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=prefix, progress=False)
    except RuntimeError as error:  # torch's error for a wrong hash
        raise ArtifactError(f"{url}: {error}") from None
    except (http.client.HTTPException, OSError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = str(getattr(error, "reason", None) or error).strip()
        raise MachineError(
            f"cannot download {url} ({reason}); download it elsewhere and save it as {file}, "
            f"or use --weights FILE or --weights none"
        ) from None
    finally:
        socket.setdefaulttimeout(old_timeout)
    return file


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_tensors(file: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pth file, by their plain names; on the device "meta" without values.

    A .pth is read with `weights_only=True`. It may be a state dict or hold one under keys of HOLDERS, also nested.
    Names may have prefixes of WRAPPERS. Raises ArtifactError.
    """
    if not file.is_file():
        raise ArtifactError(f"{file}: there is no such weights file{similar_path(file)}")
    if _unpacked_bytes(file) > MAX_WEIGHTS:
        raise ArtifactError(f"{file}: larger than {MAX_WEIGHTS >> 30} GiB, not the weights of a ResNet")
    try:
        if file.suffix == ".safetensors":
            return _unwrapped(file, _tensors_in_header(file) if device == "meta" else load_file(file, device))
        with warnings.catch_warnings(action="ignore"):  # torch's, about old pickles that it then reads or refuses
            loaded = torch.load(file, map_location=device, weights_only=True)
    except SafetensorError as error:
        raise ArtifactError(f"{file}: not a safetensors file ({error})") from None
    except DAMAGED as error:
        reason = str(error).strip().split("\n")[0] or "it is empty or ends early"
        if reason.startswith("Weights only load failed"):  # the rest advises to run the code
            reason = "it contains more than tensors; load it where you trust it, and save its state dict as safetensors"
        raise ArtifactError(f"{file}: not a weights file that can be read safely ({reason})") from None
    for _ in range(len(HOLDERS)):
        held = [loaded[key] for key in HOLDERS if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)]
        loaded = held[0] if held else loaded
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise ArtifactError(f"{file}: contains no state dict (a mapping of names to tensors)")
    for name, value in loaded.items():
        if value.layout != torch.strided or value.is_quantized or (value.is_meta and device != "meta"):
            raise ArtifactError(f"{file}: {name} is sparse, quantized or without values, not an ordinary tensor")
    return _unwrapped(file, loaded)


def _tensors_in_header(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file on the meta device, from its header alone."""
    tensors = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            part = opened.get_slice(name)
            kind = DTYPES.get(part.get_dtype())
            if kind is None:
                raise ValueError(f"{name} has the type {part.get_dtype()}")
            tensors[name] = torch.empty(part.get_shape(), dtype=kind, device="meta")
    return tensors


def _unwrapped(file: Path, tensors: Tensors) -> dict[str, torch.Tensor]:
    plain: dict[str, str] = {}
    for name in tensors:
        other = plain.setdefault(_plain_name(name), name)
        if other != name:
            raise ArtifactError(f"{file}: contains {_plain_name(name)} twice, as {other} and as {name}")
    return {short: tensors[name] for short, name in plain.items()}


def _plain_name(name: str) -> str:
    """The name without prefixes, and without torch.compile's `_orig_mod` anywhere in it."""
    parts = name.split(".")
    while parts[0] in WRAPPERS and len(parts) > 1:
        parts.pop(0)
    return ".".join(part for part in parts if part != "_orig_mod")


def _unpacked_bytes(file: Path) -> int:
    """The number of bytes after unpacking. A .pth is a zip archive, which may be compressed."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            return max(size, sum(part.file_size for part in archive.infolist()))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return size


def load_backbone(model: nn.Module, tensors: Tensors, architecture: Architecture, source: str) -> None:
    """Copy the backbone from `tensors` into the model. Raises ArtifactError with the tensor that does not fit."""
    given = check_backbone(tensors, architecture, source)
    check_finite(given, source)
    model.load_state_dict(given, strict=False)


def check_finite(tensors: Tensors, source: str) -> None:
    """Raise ArtifactError with the first tensor that contains a value that is not finite."""
    damaged = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if damaged:
        raise ArtifactError(f"{source}: {damaged[0]} contains values that are not finite")


def check_backbone(tensors: Tensors, architecture: Architecture, source: str) -> Tensors:
    """The tensors of the backbone, on any device. Raises ArtifactError with the tensor that does not fit."""
    wanted = {name: value for name, value in empty(architecture).state_dict().items() if stage_of(name) != "head"}
    given = {name: value for name, value in tensors.items() if stage_of(name) != "head"}
    check_fit(wanted, given, f"{source}: does not fit {architecture.name}")
    return given


def check_fit(wanted: Tensors, given: Tensors, what: str) -> None:
    """Raise ArtifactError that starts with `what` and names the first tensor that does not fit."""
    problems = _misfits(wanted, given)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(f"{what}: {problems[0]}{more}{fitting(given)}")


def _misfits(wanted: Tensors, given: Tensors) -> list[str]:
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # older files lack them
    problems = [f"{name} is missing" for name in wanted if name not in given and name not in counters]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    problems += [
        f"{name} holds {_kind_of(given[name])} instead of {_kind_of(value)}"
        for name, value in wanted.items()
        if name in given and name not in counters and _kind_of(given[name]) != _kind_of(value)
    ]
    return problems


def _kind_of(tensor: torch.Tensor) -> str:
    """The kind of values in a tensor, of any precision."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_complex()
    return ("real" if tensor.is_floating_point() else "whole") + " numbers" if plain else "another kind of tensor"


def fitting(tensors: Tensors) -> str:
    """`; it fits --model resnet34` if one of the architectures has exactly these names and shapes, without the head."""
    given = {name: value for name, value in tensors.items() if stage_of(name) != "head"}
    first = given.get("conv1.weight")
    stem = "small" if first is not None and first.shape[2:] == (3, 3) else "standard"
    for name in ARCHITECTURES:
        other = empty(Architecture(name=name, stem=stem, head="linear", head_hidden=(), dropout=0.0, num_classes=2))
        wanted = {key: value for key, value in other.state_dict().items() if stage_of(key) != "head"}
        if not _misfits(wanted, given):
            return f"; it fits --model {name}" + ("" if stem == "standard" else " --stem small")
    return ""
