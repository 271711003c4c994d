"""Split a folder into train, val and test, written as a manifest, links or copies."""

import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from resnet_dist.config.fields import option, out_of_range, required
from resnet_dist.config.layers import from_keywords, keyword_signature
from resnet_dist.errors import MachineError, UsageError, python_errors
from resnet_dist.files.outputs import TEMPORARY
from resnet_dist.runtime.notebook import html_table
from resnet_dist.runtime.wording import counted, printable

Row = tuple[str, str, str]  # path relative to the source, label, part


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Split a folder of images into train, val and test, stratified and seeded. No image is moved or deleted."""

    source: str | None = option(None, positional=True)
    """A folder of class folders (or a flat folder, with --label-by)."""
    out: str | None = option(None, positional=True)
    """The manifest to write (.csv), or the folder to create with --how link or copy."""
    val: float = 0.2
    """Share of every class for validation."""
    test: float = 0.0
    """Share of every class for test."""
    seed: int = 0
    """Seed of the split."""
    group_by: str | None = None
    """Regular expression on the relative path. Images with equal matches stay in the same split."""
    label_by: str | None = None
    """Regular expression on the file name. Its first group is the label: "^(cat|dog)" for cat.0.jpg. Spaces around the
    label are removed."""
    how: Literal["manifest", "link", "copy"] = "manifest"
    """manifest: a CSV of path,label,split; link: folders of symbolic links; copy: folders of copies."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        if self.source is None or self.out is None:
            yield "SOURCE and OUT are needed, such as: resnet-dist split photos photos.csv"
        elif self.how == "manifest" and not self.out.endswith(".csv"):
            yield f"OUT {self.out}: the name of a manifest must end in .csv (for folders, add --how link or --how copy)"
        yield from out_of_range(self, 0, 1, "val", "test")
        if not 0 < self.val + self.test < 1:
            yield f"--val {self.val:g} and --test {self.test:g}: their sum must be between 0 and 1"
        for name in ("group_by", "label_by"):
            try:
                groups = re.compile(getattr(self, name) or "()").groups
            except re.error as error:
                yield f"--{name.replace('_', '-')} '{getattr(self, name)}' is not a regular expression: {error}"
                continue
            if name == "label_by" and groups == 0:
                yield f"--label-by '{self.label_by}' has no group: put the label in parentheses, such as ^(cat|dog)"


@dataclass(frozen=True)
class Split:
    """The result of `split`.

    Attributes:
        path: the manifest or the folder. A Split can be used as a path, for example in `train`.
        counts: the number of images of each split that is not empty: train, val, test.
        classes: the number of classes.
        notes: warnings about the groups.
    """

    path: Path
    counts: Mapping[str, int]
    classes: int
    notes: Sequence[str]

    def __fspath__(self) -> str:
        return str(self.path)

    def line(self) -> str:
        """The result as a line of text."""
        described = ", ".join(f"{count} {part}" for part, count in self.counts.items())
        images = counted(sum(self.counts.values()), "image")
        return f"{self.path}: {images} of {counted(self.classes, 'class')}: {described}"

    def _repr_html_(self) -> str:
        rows = [(part, str(count)) for part, count in self.counts.items()]
        return html_table(f"Split {self.path}", [("classes", str(self.classes)), *rows])


def split(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, verbose: bool = False, **settings: Any
) -> Split:
    """Split a folder of images into train, val and test, stratified and seeded. No image is moved or deleted.

    `source` is a folder of class folders (or flat, with `label_by`). `out` is the manifest to write (.csv), or the
    folder to create with how="link" or how="copy". The keywords are the options of `resnet-dist split`.
    Raises UsageError, DataError if a class is too small, MachineError.
    """
    with python_errors():
        result = run_split(from_keywords(SplitConfig, {"source": source, "out": out, **settings}))
    for line in (*result.notes, result.line()) if verbose else ():
        print(printable(line))
    return result


split.__signature__ = keyword_signature(SplitConfig, verbose=False)  # type: ignore[attr-defined]


def run_split(cfg: SplitConfig) -> Split:
    """Assign every image to a split, and write the manifest, links or copies. Raises ResnetDistError."""
    from resnet_dist.data.index import class_rows, flat_rows
    from resnet_dist.data.same_file import refuse_links
    from resnet_dist.data.split import assign, groups_note

    source, out = Path(required(cfg.source, "SOURCE")), Path(required(cfg.out, "OUT"))
    check_places(source, out, cfg.how)
    images = class_rows(source) if cfg.label_by is None else flat_rows(source, cfg.label_by)
    paths = [path for path, _ in images]
    refuse_links(str(source), source, paths)
    shares = {"val": cfg.val, "test": cfg.test}
    parts = assign(paths, [label for _, label in images], shares, cfg.seed, cfg.group_by)
    rows = [(path, label, part) for (path, label), part in zip(images, parts, strict=True)]
    if cfg.how == "manifest":
        _write_manifest(source, out, rows)
    else:
        _write_folders(source, out, rows, cfg.how)
    counts = Counter(parts)
    sizes = {part: counts[part] for part in ("train", "val", "test") if counts[part]}
    notes = list(groups_note(paths, cfg.group_by))
    return Split(out, sizes, len({label for _, label in images}), notes)


def check_places(source: Path, out: Path, how: str) -> None:
    """Raise UsageError if SOURCE is not a folder, or if OUT exists or is inside SOURCE."""
    if source.is_file():
        raise UsageError(f"{source}: SOURCE must be a folder; a manifest has its split in a column `split`")
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: it exists already; nothing is overwritten, choose another name")
    if how != "manifest" and out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: it is inside {source} and would become a class there; choose a folder outside")


def _write_manifest(source: Path, out: Path, rows: Sequence[Row]) -> None:
    """Write paths relative to the manifest if the images are below its folder, otherwise absolute paths."""
    from resnet_dist.files.run import to_csv, write_atomically

    base, root = out.absolute().parent, source.absolute()
    prefix = root.relative_to(base) if root.is_relative_to(base) else root
    write_atomically(
        out, to_csv(("path", "label", "split"), [(prefix / path, label, part) for path, label, part in rows])
    )


def _free_name(target: Path, taken: set[Path]) -> Path:
    """The name, or if it is taken, the name with the first free number after its stem."""
    if target not in taken:
        return target
    numbered = (target.with_stem(f"{target.stem}-{number}") for number in itertools.count(2))
    return next(name for name in numbered if name not in taken)


def _write_folders(source: Path, out: Path, rows: Sequence[Row], how: str) -> None:
    """Write OUT/<split>/<label>/<name>. If files in sub-folders of a class have the same name, their folders are added.

    OUT gets its name when it is complete. If that fails, it is removed and MachineError is raised.
    """
    made, taken = out.with_name(f"{TEMPORARY}{os.getpid()}-{out.name}"), set[Path]()
    try:
        made.mkdir(parents=True)
        for path, label, part in rows:
            target = made / part / label / Path(path).name
            if target in taken:
                target = _free_name(target.with_name("_".join(Path(path).parts)), taken)
            taken.add(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            if how == "link":
                target.symlink_to((source / path).absolute())
            else:
                shutil.copy2(source / path, target)
        made.rename(out)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise MachineError(f"{out}: cannot be written ({error.strerror})") from None
