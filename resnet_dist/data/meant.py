"""Hints for errors about data: the folder that was probably meant."""

import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from export.predict import EXTENSIONS, entries_of, is_folder
from resnet_dist.data.manifest import SPLIT_OF
from resnet_dist.runtime.wording import listed, similar_path

MOST_FOLDERS = 300  # that are looked at
DEPTH = 3
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


def missing(data: Path) -> str:
    """The error for a folder or manifest that does not exist, with the most similar name next to it."""
    hint = did_you_mean(data.parent) if data.suffix.lower() in EXTENSIONS else similar_path(data)
    return f"{data}: there is no such folder or manifest{hint}"


def not_a_manifest(file: Path) -> str:
    """Why a file is no manifest, if its name shows it: an image or an archive; otherwise ""."""
    suffix = file.suffix.lower()
    if suffix in EXTENSIONS:
        return f"{file}: an image; give the folder that holds one sub-folder per class{did_you_mean(file.parent)}"
    if suffix in ARCHIVES:
        return f"{file}: an archive; unpack it and give the folder"
    return ""


def did_you_mean(folder: Path) -> str:
    """The text `; did you mean 'photos/train'?` if a data set is above or below a folder that is none; otherwise ""."""
    with suppress(OSError):
        if not _is_data_set(folder) and (near := _above(folder) or _below(folder)) is not None:
            return f"; did you mean '{near}'?"
    return ""


def without_classes(folder: Path, labels: Sequence[str]) -> str:
    """The end of an error if the class folders that were found are train, val or test folders; otherwise ""."""
    if not labels or not all(label.lower() in SPLIT_OF for label in labels):
        return ""
    if hint := did_you_mean(folder):
        return hint
    if "train" not in {SPLIT_OF[label.lower()] for label in labels}:
        return f": there is {listed(labels)}, but no folder 'train' with one sub-folder per class"
    return f": {listed(labels)} must hold one sub-folder per class, not images"


def other_splits(folder: Path) -> list[str]:
    """The names of the validation and test folders next to a training folder; empty for any other folder."""
    if SPLIT_OF.get(folder.name.lower()) != "train":
        return []
    with suppress(OSError):
        beside = [Path(path) for path in _folders(folder.parent)]
        return [one.name for one in beside if SPLIT_OF.get(one.name.lower()) in ("val", "test") and _classes(one)]
    return []


def _above(folder: Path) -> Path | None:
    """The data set that a class folder belongs to."""
    parent = folder.absolute().parent
    if not _has_images(folder) or not _is_data_set(parent):
        return None
    shown = parent if folder.is_absolute() else Path(os.path.relpath(parent))
    return shown.parent if parent.name.lower() in SPLIT_OF and _is_data_set(parent.parent) else shown


def _below(folder: Path) -> Path | None:
    """The nearest data set inside a folder."""
    queue = deque([(folder, 0)])
    for _ in range(MOST_FOLDERS):
        if not queue:
            break
        here, depth = queue.popleft()
        if depth and _is_data_set(here):
            return here
        if depth < DEPTH:
            queue.extend((Path(path), depth + 1) for path in _folders(here)[:MOST_FOLDERS])
    return None


def _is_data_set(folder: Path) -> bool:
    """Whether a folder has at least two class folders, or a train folder that has."""
    trains = [path for path in _folders(folder) if SPLIT_OF.get(Path(path).name.lower()) == "train"]
    if any(len(_classes(Path(path))) > 1 for path in trains):
        return True
    classes = _classes(folder)
    return len(classes) > 1 and not all(name.lower() in SPLIT_OF for name in classes)


def _classes(folder: Path) -> list[str]:
    """The names of the sub-folders that hold images directly."""
    return [Path(path).name for path in _folders(folder)[:MOST_FOLDERS] if _has_images(Path(path))]


def _folders(folder: Path) -> list[str]:
    return [entry.path for entry in entries_of(folder) if is_folder(entry)]


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(Path(entry.name).suffix.lower() in EXTENSIONS for entry in entries)
