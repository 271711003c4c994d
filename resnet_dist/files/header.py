"""The description in the header of a checkpoint, read without torch and without the weights."""

import stat
import struct
from pathlib import Path
from typing import Any

from resnet_dist.errors import ArtifactError
from resnet_dist.files.reading import parse_json
from resnet_dist.runtime.wording import similar_path

METADATA_KEY = "resnet_dist"
MAX_HEADER = 1 << 25  # enough for 100,000 class names; the header of a ResNet without them has 30 KB


def best_of(run_or_file: str | Path) -> Path:
    """The best checkpoint of a run folder, or the file itself."""
    path = Path(run_or_file)
    return path / "checkpoints" / "best.safetensors" if path.is_dir() else path


def description_in(file: Path) -> dict[str, Any] | None:
    """The description that resnet-dist wrote into a safetensors file, as unchecked JSON values; None if there is none.

    A safetensors file starts with 8 bytes, the length of a JSON object, followed by that object. Its `__metadata__`
    contains free text (https://github.com/huggingface/safetensors). Raises ArtifactError.
    """
    try:
        header = parse_json(_header_of(file))
        metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
        if not isinstance(metadata, dict):
            raise ValueError("its header must be a JSON object")
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}){similar_path(file)}") from None
    except ValueError as error:
        raise ArtifactError(f"{file}: not a safetensors file ({error})") from None
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        values = parse_json(text)
        if not isinstance(values, dict):
            raise ValueError("it must be a JSON object")
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file}: its description is damaged: {error}") from None
    return values


def _header_of(file: Path) -> bytes:
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("not a file")
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise ValueError("shorter than a header")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER:
            raise ValueError(f"its header is longer than {MAX_HEADER >> 20} MiB")
        return stream.read(length)


def random_stream_of(run_or_file: str | Path) -> int:
    """The random stream of an old run or checkpoint; 0 if it has none. Raises ArtifactError."""
    file = best_of(run_or_file)
    config = (description_in(file) or {}).get("config")
    run = config.get("run") if isinstance(config, dict) else None
    stream = run.get("random_stream", 0) if isinstance(run, dict) else 0
    if type(stream) is not int or stream < 0:
        raise ArtifactError(f"{file}: its description is damaged: random_stream must be an integer >= 0")
    return stream


def network_of(run_or_file: str | Path) -> dict[str, Any]:
    """The network of an old run or checkpoint, as the section [model] of a config. Raises ArtifactError."""
    file = best_of(run_or_file)
    values = description_in(file)
    if values is None:
        raise ArtifactError(f"{file}: not written by resnet-dist; give other weights with --weights FILE")
    head = values.get("head")
    if not isinstance(head, dict) or not {"name", "hidden", "dropout"} <= head.keys() or "stem" not in values:
        raise ArtifactError(f"{file}: its description is damaged: the network is missing")
    network = {"model": values.get("architecture"), "stem": values["stem"], "head": head["name"]}
    hidden = {"head_hidden": head["hidden"]} if head["hidden"] else {}
    return {**network, **hidden, "dropout": head["dropout"], "weights": "none"}
