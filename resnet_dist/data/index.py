"""Find the images, their classes and their splits, in folders or in a CSV manifest."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.predict import EXTENSIONS, entries_of, ignored_text, images_below, is_folder
from resnet_dist.config.fields import required
from resnet_dist.config.schema import DataConfig
from resnet_dist.data import meant
from resnet_dist.data.exclude import leave_out
from resnet_dist.data.manifest import SPLIT_NAMES, Row, appearance, lookalikes, read_manifest, stripped
from resnet_dist.data.same_file import refuse_links
from resnet_dist.data.split import assign, groups_note
from resnet_dist.errors import DataError, UsageError
from resnet_dist.files.run import read_facts, to_csv, write_atomically
from resnet_dist.runtime.wording import counted, listed, similar_path


class PathTable:
    """Relative paths in two arrays instead of a list of str.

    Loader processes share these arrays with their parent. A million strings would be copied into each of them, because
    reading a string changes its reference count.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> str:
        """A hash of all paths in their order."""
        return hashlib.sha256(self._ends.tobytes() + self._bytes.tobytes()).hexdigest()


@dataclass(frozen=True)
class ImageTable:
    """The images of one split: paths relative to `root`, and targets int64 (n,), each an index into the classes.

    `notes` are notes and warnings for the user.
    """

    root: Path
    paths: PathTable
    targets: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, row: int) -> Path:
        """The path of the image in a row."""
        return self.root / self.paths[row]

    def take(self, rows: Sequence[int] | np.ndarray) -> "ImageTable":
        """A table of some rows, in the given order."""
        chosen = [int(row) for row in rows]
        return ImageTable(self.root, PathTable([self.paths[row] for row in chosen]), self.targets[chosen])

    def spread(self, count: int) -> list[int]:
        """At most `count` row numbers, evenly spread from the first row to the last."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).round()
        return sorted({int(row) for row in rows})


@dataclass(frozen=True)
class ImageIndex:
    """All images of a data set. `classes`: the sorted class names of the training split; the position is the index."""

    root: Path
    classes: tuple[str, ...]
    train: ImageTable
    val: ImageTable
    test: ImageTable
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> dict[str, Any]:
        """Values that identify a data set: classes, number of images, and a hash of all paths, classes and splits."""
        digest = hashlib.sha256()
        for split in ("train", "val", "test"):
            part = self.part(split)
            for path, target in zip(part.paths, part.targets.tolist(), strict=True):
                digest.update(os.fsencode(f"{split}\0{target}\0{path}\0"))
        images = len(self.train) + len(self.val) + len(self.test)
        return {"classes": list(self.classes), "images": images, "sha256": digest.hexdigest()}

    def part(self, split: str) -> ImageTable:
        """The images of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


@dataclass
class _Listing:
    """Rows of a folder or manifest: (path relative to the root, label, split or None)."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def read_index(cfg: DataConfig) -> ImageIndex:
    """Find the images that `cfg` names, split them if they are not split, and check the classes.

    Raises DataError, which names the folder, file or class, if the data cannot be trained on.
    """
    data = Path(required(cfg.data, "DATA"))
    root, listing = _listing_of(data)
    if cfg.val_dir is not None:
        root, listing = _with_val_dir(root, listing, Path(cfg.val_dir))
    if not listing.rows:
        raise DataError(
            f"{data}: no images found{_ignored(data, listing)}; one sub-folder per class is expected{_flat(data)}"
        )
    if data.is_dir():
        _refuse_other_folders(data, listing, cfg)
    if cfg.exclude_list is not None:
        before, listing.rows = len(listing.rows), leave_out(listing.rows, Path(cfg.exclude_list), root)
        listing.notes.append(f"{before - len(listing.rows)} of {counted(before, 'image')} left out (--exclude-list)")
    return _index(root, listing, cfg)


def _listing_of(data: Path) -> tuple[Path, _Listing]:
    """The rows of a folder or a manifest, and the folder to which their paths are relative. Raises DataError."""
    if not data.exists():
        raise DataError(meant.missing(data))
    if not data.is_file():
        return data, _read_folder(data)
    if reason := meant.not_a_manifest(data):
        raise DataError(reason)
    return data.parent, _Listing(*read_manifest(data, data.parent))


def _refuse_other_folders(data: Path, listing: _Listing, cfg: DataConfig) -> None:
    """Raise DataError for a folder above or below the one that was meant; a warning if other splits are next to it."""
    labels = sorted({label for _, label, _ in listing.rows})
    is_split = any(split is not None for _, _, split in listing.rows)  # then a class may be called "train"
    if not is_split and (hint := meant.without_classes(data, labels)):
        raise DataError(f"{data}: no class folders found{hint}")
    if len(labels) < 2:
        raise DataError(f"{_one_class(labels)}{meant.did_you_mean(data)}")
    others = meant.other_splits(data) if cfg.val_dir is None else []
    if others:
        listing.notes.append(
            f"WARNING: {data} is the training folder of a data set whose {listed(others)} this run does not use; give "
            f"{data.parent} to use all"
        )


def _one_class(classes: Sequence[str]) -> str:
    names = f"only one, '{classes[0]}'" if classes else "none"
    return f"at least two classes with training images are needed, but there is {names}"


def _index(root: Path, listing: _Listing, cfg: DataConfig) -> ImageIndex:
    notes = list(listing.notes)
    if listing.ignored:
        notes.append(f"ignored{ignored_text(listing.ignored)}")
    rows = sorted(listing.rows)
    splits = {split for _, _, split in rows}
    if splits == {"train"} and cfg.val_dir is None:
        rows, splits = [(path, label, None) for path, label, _ in rows], {None}
    if "val" not in splits and "test" in splits and "train" in splits:
        notes.append(
            "WARNING: there is no val split, so the test split is used for validation: its score is not a test score"
        )
        rows = [(path, label, "val" if split == "test" else split) for path, label, split in rows]
    elif "val" not in splits:
        rows, split_notes = _split_here(rows, cfg)
        notes += split_notes
    classes = tuple(sorted({label for _, label, split in rows if split == "train"}))
    _check_classes(rows, classes)
    notes += _confusable(classes)
    validated = {label for _, label, split in rows if split == "val"}
    absent = [name for name in classes if name not in validated]
    if absent:
        notes.append(f"WARNING: no validation images for class {listed(absent)}; the class keeps its index")
    train, val, test = (_table(root, rows, classes, split) for split in ("train", "val", "test"))
    return ImageIndex(root, classes, train, val, test, tuple(notes))


def _split_here(rows: list[Row], cfg: DataConfig) -> tuple[list[Row], list[str]]:
    """Hold out validation images from the training rows. Rows of the test split stay there."""
    ours = [(path, label) for path, label, split in rows if split != "test"]
    shares = {"val": cfg.val_split}
    paths = [path for path, _ in ours]
    parts = assign(paths, [label for _, label in ours], shares, cfg.split_seed, cfg.group_by)
    split_rows: list[Row] = [(*row, part) for row, part in zip(ours, parts, strict=True)]
    split_rows += [row for row in rows if row[2] == "test"]
    held_out = sum(part == "val" for part in parts)
    note = f"{held_out} of {counted(len(ours), 'image')} held out for validation (seed {cfg.split_seed})"
    return sorted(split_rows), [note, *groups_note(paths, cfg.group_by)]


def _check_classes(rows: list[Row], classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise DataError(_one_class(classes))
    for split in ("val", "test"):
        unknown = {label for _, label, part in rows if part == split} - set(classes)
        if unknown:
            raise DataError(
                f"{split} has class {listed(sorted(unknown))}, which train does not have; add training images, "
                "or remove it"
            )


def _confusable(classes: Sequence[str]) -> Iterator[str]:
    """Warnings for names that differ only in case, spaces or Unicode composition: often one class twice."""
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(appearance(name).casefold(), name)
        if other != name:
            names = listed([other, name])
            yield f"WARNING: the classes {names} differ only in case, in spaces or in the encoding of letters"


def _table(root: Path, rows: Sequence[Row], classes: tuple[str, ...], split: str) -> ImageTable:
    number = {name: index for index, name in enumerate(classes)}
    ours = [(path, number[label]) for path, label, part in rows if part == split]
    targets = np.array([target for _, target in ours], dtype=np.int64)
    return ImageTable(root, PathTable([path for path, _ in ours]), targets)


def _ignored(folder: Path, listing: _Listing) -> str:
    """The files that are not read, by extension; images that lie directly in the folder are named as such."""
    images = Counter({kind: count for kind, count in listing.ignored.items() if kind in EXTENSIONS})
    others = ignored_text(listing.ignored - images)
    return f" in sub-folders, but {counted(images.total(), 'image')} directly in it{others}" if images else others


def _flat(folder: Path) -> str:
    """A hint about the folder that was meant, or about class names in file names if images lie directly in it."""
    if hint := meant.did_you_mean(folder):
        return hint
    if folder.is_dir() and any(Path(entry.name).suffix.lower() in EXTENSIONS for entry in _entries(folder)):
        return ", or use `resnet-dist split --label-by` if the class is in the file names"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _read_folder(root: Path) -> _Listing:
    """Read a folder with train/, val/ and test/ of class folders, or a folder of class folders."""
    listing = _Listing()
    split_folders = _split_folders(root)
    if "train" not in split_folders:
        _read_classes(root, root, None, listing)
        return listing
    for split, folder in split_folders.items():
        _read_classes(root, folder, split, listing)
    others = [e.name for e in _entries(root) if is_folder(e) and Path(e.path) not in split_folders.values()]
    if others:
        listing.notes.append(f"WARNING: besides {' and '.join(split_folders)}, the folder {listed(others)} is not read")
    return listing


def _split_folders(root: Path) -> dict[str, Path]:
    """Sub-folders named like a split that contain folders. A class may also be called "train"."""
    folders: dict[str, Path] = {}
    for entry in _entries(root):
        split = next((split for split, names in SPLIT_NAMES.items() if entry.name.lower() in names), None)
        if split is None or not is_folder(entry) or not any(map(is_folder, _entries(Path(entry.path)))):
            continue
        if split in folders:
            raise DataError(
                f"{root}: both '{folders[split].name}' and '{entry.name}' could be the {split} split: remove one"
            )
        folders[split] = Path(entry.path)
    return folders


def _read_classes(root: Path, folder: Path, split: str | None, listing: _Listing) -> None:
    """Add the images of each class folder, at any depth, to the listing."""
    entries = _entries(folder)
    above = frozenset((s.st_dev, s.st_ino) for s in (root.stat(), folder.stat()))
    for entry in entries:
        if not is_folder(entry):
            listing.ignored[Path(entry.name).suffix.lower()] += 1
            continue
        before = len(listing.rows)
        for path in _images_below(Path(entry.path), listing, above):
            listing.rows.append((os.path.relpath(path, root), entry.name, split))
        if len(listing.rows) == before and split in ("train", None):
            raise DataError(
                f"{entry.path}: a class folder without images{ignored_text(listing.ignored)}; add images or remove it"
            )


def _images_below(folder: Path, listing: _Listing, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    try:
        yield from images_below(folder, listing.ignored, listing.notes, above)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return entries_of(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}){similar_path(folder)}") from None


def _with_val_dir(root: Path, listing: _Listing, val_dir: Path) -> tuple[Path, _Listing]:
    """The training rows of a listing and, as validation, the class folders of `val_dir`."""
    if not val_dir.is_dir():
        raise DataError(f"{val_dir}: there is no such folder (--val-dir){similar_path(val_dir)}")
    common = Path(os.path.commonpath([root.absolute(), val_dir.absolute()]))
    joined = _Listing(ignored=listing.ignored, notes=listing.notes)
    for path, label, split in listing.rows:
        if split in ("train", None):
            joined.rows.append((os.path.relpath(root.absolute() / path, common), label, "train"))
    _read_classes(common, val_dir.absolute(), "val", joined)
    return common, joined


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def write_manifest(file: Path, index: ImageIndex) -> None:
    """Write an index as a manifest: path (relative to the root of the index), label, split."""
    rows = [
        (path, index.classes[target], split)
        for split in ("train", "val", "test")
        for path, target in zip(index.part(split).paths, index.part(split).targets.tolist(), strict=True)
    ]
    write_atomically(file, to_csv(("path", "label", "split"), rows))


def read_part(data: Path, split: str, classes: Sequence[str], root: Path | None = None) -> ImageTable:
    """One split of a folder or manifest, with the class indices of a trained model.

    If the data has no splits, all images are read. The paths of a manifest are relative to `root` (default: the folder
    of the manifest). Raises DataError for a class that the model does not have.
    """
    if not data.exists():
        raise DataError(meant.missing(data))
    start = root or (data.parent if data.is_file() else data)
    listing = _Listing(*read_manifest(data, start, exact=root is not None)) if data.is_file() else _read_folder(data)
    rows = sorted((row for row in listing.rows if row[2] in (split, None)), key=lambda row: row[0])
    if not rows:
        raise DataError(f"{data}: no images in the {split} split{ignored_text(listing.ignored)}")
    unknown = {label for _, label, _ in rows} - set(classes)
    if unknown:
        raise DataError(
            f"{data}: the model does not have class {listed(sorted(unknown))}; it has {listed(list(classes))}"
            f"{meant.did_you_mean(data) if data.is_dir() else ''}"
        )
    marked: list[Row] = [(path, label, split) for path, label, _ in rows]
    table = replace(_table(start, marked, tuple(classes), split), notes=tuple(listing.notes))
    if data.is_file() and root is None:
        refuse_links(str(data), start, table.paths)
    return table


def read_run_part(run: Path, split: str, classes: Sequence[str]) -> ImageTable:
    """One split of the data that a run was trained on, from its manifest. Raises UsageError, DataError."""
    root = read_facts(run).get("data_root")
    if not isinstance(root, str):
        raise UsageError(f"{run / 'run.json'}: damaged, no data_root")
    if not Path(root).is_dir():
        raise DataError(f"{root}: the images of this run no longer exist")
    return read_part(run / "data" / "manifest.csv", split, classes, root=Path(root))


def class_rows(folder: Path) -> list[tuple[str, str]]:
    """(path, label) of the images in class folders.

    Raises DataError, also if a folder inside it was meant, and UsageError if the folder is split.
    """
    _refuse_split(folder)
    listing = _Listing()
    _read_classes(folder, folder, None, listing)
    if not listing.rows:
        raise DataError(
            f"{folder}: no images found{_ignored(folder, listing)}; one sub-folder per class is expected"
            f"{meant.did_you_mean(folder)}"
        )
    labels = sorted({label for _, label, _ in listing.rows})
    if len(labels) < 2 and (hint := meant.did_you_mean(folder)):
        raise DataError(f"{_one_class(labels)}{hint}")
    return sorted((path, label) for path, label, _ in listing.rows)


def _refuse_split(folder: Path) -> None:
    splits = _split_folders(folder)
    if "train" in splits or len(splits) > 1:
        names = " and ".join(f"{splits[name].name}/" for name in splits)
        one = splits.get("train", next(iter(splits.values())))
        raise UsageError(f"{folder}: it is already split into {names}; give one of them, such as {one}")


def flat_rows(folder: Path, pattern: str) -> list[tuple[str, str]]:
    """(path, label) of the images below a folder. The label is the first group of `pattern` in the file name.

    Spaces around labels are removed. Raises DataError with the first file that the pattern does not match, and
    UsageError if the folder is split.
    """
    _refuse_split(folder)
    listing, rows = _Listing(), []
    for path in _images_below(folder, listing):
        match = re.search(pattern, Path(path).name)
        label = stripped(match[1]) if match and match[1] else ""
        if not label:
            raise DataError(f"{path}: --label-by '{pattern}' finds no label in this name")
        if label.startswith("."):
            raise DataError(f"{path}: its label would be '{label}', which cannot be the name of a class folder")
        rows.append((os.path.relpath(path, folder), label))
    if not rows:
        raise DataError(f"{folder}: no images found{ignored_text(listing.ignored)}")
    alike = lookalikes(label for _, label in rows)
    if alike is not None:
        raise DataError(f"{folder}: the labels {alike[0]!a} and {alike[1]!a} look the same; rename the files")
    return sorted(rows)
