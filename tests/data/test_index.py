"""Which images are found, of which class and in which split: folders and CSV manifests of every shape."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from resnet_dist.config.schema import DataConfig
from resnet_dist.data.index import (
    ImageIndex,
    ImageTable,
    PathTable,
    class_rows,
    flat_rows,
    read_index,
    read_part,
    write_manifest,
)
from resnet_dist.errors import DataError

SPLIT = ("train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "val/cat/3.png", "val/dog/3.png")


def tree(root: Path, *files: str) -> Path:
    """Empty files below a root: an index never looks into an image."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def manifest(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8", newline="")
    return file


def index_of(data: Path, **options: Any) -> ImageIndex:
    return read_index(DataConfig(data=str(data), **options))


def rows(table: ImageTable) -> list[tuple[str, int]]:
    assert table.targets.dtype == np.int64
    return list(zip(table.paths, table.targets.tolist(), strict=True))


def refusal(data: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        index_of(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("Training", "Validation"), ("TRAIN", "valid"), ("training", "VAL"), ("Train", "Validation")],
)
def test_train_and_val_folders_by_any_name(tmp_path: Path, train: str, val: str) -> None:
    tree(tmp_path, *(file.replace("train/", f"{train}/").replace("val/", f"{val}/") for file in SPLIT))
    index = index_of(tmp_path)
    assert index.root == tmp_path
    assert index.classes == ("cat", "dog")
    assert rows(index.train) == [(f"{train}/cat/1.png", 0), (f"{train}/cat/2.png", 0), (f"{train}/dog/1.png", 1)]
    assert rows(index.val) == [(f"{val}/cat/3.png", 0), (f"{val}/dog/3.png", 1)]
    assert (len(index.test), index.notes) == (0, ())


def test_test_folder_is_not_used_for_validation_if_there_is_a_val_folder(tmp_path: Path) -> None:
    index = index_of(tree(tmp_path, *SPLIT, "Test/dog/9.png"))
    assert rows(index.test) == [("Test/dog/9.png", 1)]
    assert (len(index.train), len(index.val), index.notes) == (3, 2, ())


@pytest.mark.parametrize("name", ["test", "Testing"])
def test_without_val_folder_the_test_folder_is_used_with_a_warning(tmp_path: Path, name: str) -> None:
    index = index_of(tree(tmp_path, *(file.replace("val/", f"{name}/") for file in SPLIT)))
    assert rows(index.val) == [(f"{name}/cat/3.png", 0), (f"{name}/dog/3.png", 1)]
    assert len(index.test) == 0
    assert [note for note in index.notes if note.startswith("WARNING") and "not a test score" in note]


@pytest.mark.parametrize("above", ["", "train/"])
def test_class_folders_without_a_val_folder_are_split(tmp_path: Path, above: str) -> None:
    """0.25 of every class, on one side only, and the note says how many."""
    files = [f"{above}{name}/{i}.png" for name in ("cat", "dog") for i in range(8)]
    index = index_of(tree(tmp_path, *files), val_split=0.25)
    assert sorted([*index.train.paths, *index.val.paths]) == sorted(files)
    assert np.bincount(index.val.targets).tolist() == [2, 2]
    assert index.notes == ("4 of 16 images held out for validation (seed 0)",)


@pytest.mark.parametrize("name", ["train", "val", "test", "Training"])
def test_class_may_have_the_name_of_a_split(tmp_path: Path, name: str) -> None:
    """A split holds folders; a folder that holds images is a class."""
    index = index_of(tree(tmp_path, *(f"{folder}/{i}.png" for folder in (name, "bus") for i in range(4))))
    assert index.classes == tuple(sorted(("bus", name)))
    assert len(index.train) + len(index.val) == 8


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    said = refusal(tree(tmp_path, *SPLIT, "Training/cat/1.png"))
    assert "'Training' and 'train' could be the train split" in said


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_classes_are_ordered_as_in_torchvision(tmp_path: Path) -> None:
    names = ["9", "10", "1", "Zebra", "ant", "Ärger", "a b", "_x"]
    tree(tmp_path, *(f"{split}/{name}/i.png" for split in ("train", "val") for name in names))
    index = index_of(tmp_path)
    assert {name: i for i, name in enumerate(index.classes)} == ImageFolder(tmp_path / "train").class_to_idx
    expected = [(os.path.relpath(path, tmp_path), target) for path, target in ImageFolder(tmp_path / "train").samples]
    assert rows(index.train) == expected


def test_class_missing_in_val_keeps_its_index(tmp_path: Path) -> None:
    """Where torchvision's ImageFolder would shift the labels of all that follow."""
    tree(tmp_path, "train/ant/1.png", "train/bee/1.png", "train/cat/1.png", "val/bee/2.png", "val/cat/2.png")
    index = index_of(tmp_path)
    assert ImageFolder(tmp_path / "val").class_to_idx == {"bee": 0, "cat": 1}
    assert rows(index.val) == [("val/bee/2.png", 1), ("val/cat/2.png", 2)]
    assert index.notes == ("WARNING: no validation images for class 'ant'; the class keeps its index",)


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_missing_in_train_is_refused(tmp_path: Path, split: str) -> None:
    said = refusal(tree(tmp_path, *SPLIT, f"{split}/emu/1.png"))
    assert f"{split} has class 'emu', which train does not have" in said


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ((), "no images found"),
        (("1.jpg", "2.jpg", "3.gif"), "one sub-folder per class is expected"),
        (("cat/1.png", "cat/2.png"), "only one, 'cat'"),
        (("cat/1.png", "dog/.hidden.png"), "dog: a class folder without images"),
        (
            (*SPLIT, "train/emu/1.gif"),
            r"emu: a class folder without images (files that are not read as images: 1 .gif)",
        ),
        (("train/readme.txt", "train/cat/x/y.txt", "val/cat/1.png"), "cat: a class folder without images"),
        (("cat/1.png", "cat/2.png", "dog/1.png"), "class 'dog' has 1 image: too few"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_refused(tmp_path: Path, files: Sequence[str], reason: str) -> None:
    assert reason in refusal(tree(tmp_path, *files))


def test_a_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: there is no such folder or manifest"


def test_an_empty_class_folder_in_val_is_a_warning(tmp_path: Path) -> None:
    (tree(tmp_path, *SPLIT, "train/emu/1.png") / "val" / "emu").mkdir()
    assert "no validation images for class 'emu'" in index_of(tmp_path).notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# What folders hold besides images


def test_nested_folders_belong_to_the_class_at_the_top(tmp_path: Path) -> None:
    index = index_of(tree(tmp_path, *SPLIT, "train/dog/puppies/small/0.png"))
    assert ("train/dog/puppies/small/0.png", 1) in rows(index.train)


def test_files_of_file_managers_are_ignored(tmp_path: Path) -> None:
    droppings = [".DS_Store", "__MACOSX/cat/1.png", "train/.ipynb_checkpoints/1.png", "train/__MACOSX/cat/1.png"]
    droppings += ["train/cat/._1.png", "train/cat/Thumbs.db", "train/dog/desktop.ini", "train/dog/.cache/1.png"]
    index = index_of(tree(tmp_path, *SPLIT, *droppings))
    assert sorted([*index.train.paths, *index.val.paths]) == sorted(SPLIT)
    assert (index.classes, index.notes) == (("cat", "dog"), ())


def test_other_files_are_counted_and_named(tmp_path: Path) -> None:
    others = ["train/cat/a.gif", "train/dog/b.GIF", "train/labels.csv", "val/cat/notes", "val/dog/x/c.svg"]
    index = index_of(tree(tmp_path, *SPLIT, *others))
    assert len(index.train) + len(index.val) == len(SPLIT)
    (note,) = index.notes
    for part in ("2 .gif", "1 .csv", "1 .svg", "1 without extension"):
        assert part in note


@pytest.mark.parametrize("extension", ["JPG", "Jpeg", "jfif", "webp", "TIF", "bmp", "ppm"])
def test_extensions_in_any_case(tmp_path: Path, extension: str) -> None:
    assert f"train/cat/0.{extension}" in list(index_of(tree(tmp_path, *SPLIT, f"train/cat/0.{extension}")).train.paths)


@pytest.mark.parametrize("target", ["train/cat", "train", ".", "train/cat/loop"])
def test_circular_link_adds_no_images(tmp_path: Path, target: str) -> None:
    """Neither copies of the class's own images, nor, through a folder above, those of other classes under its name."""
    tree(tmp_path, *SPLIT)
    (tmp_path / "train" / "cat" / "loop").symlink_to(tmp_path / target)
    index = index_of(tmp_path)
    assert [path for path, _ in rows(index.train)] == sorted(file for file in SPLIT if file.startswith("train"))


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    tree(tmp_path, *(f"data/{file}" for file in SPLIT), "elsewhere/more/5.png", "elsewhere/6.png")
    (tmp_path / "data/train/dog/more").symlink_to(tmp_path / "elsewhere/more")
    (tmp_path / "data/train/dog/6.png").symlink_to(tmp_path / "elsewhere/6.png")
    found = list(index_of(tmp_path / "data").train.paths)
    assert found[-2:] == ["train/dog/6.png", "train/dog/more/5.png"]


NAMES = [
    "a b",
    "line\nfeed",
    "carriage\rreturn",
    'quo"te',
    "com,ma",
    "größe",
    "日本",
    "-=+@",
    "%s",
    os.fsdecode(b"\xe9\xff"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_file_name_survives_index_and_manifest(tmp_path: Path, name: str) -> None:
    """Of a class and of a file; bytes that are no text too."""
    index = index_of(tree(tmp_path, *SPLIT, f"train/{name}/{name}.png", f"val/{name}/2.png"))
    assert index.classes == tuple(sorted(("cat", "dog", name)))
    assert f"train/{name}/{name}.png" in list(index.train.paths)
    write_manifest(tmp_path / "split.csv", index)
    again = index_of(tmp_path / "split.csv")
    assert [rows(again.part(split)) for split in ("train", "val")] == [rows(index.train), rows(index.val)]
    assert again.classes == index.classes


# ---------------------------------------------------------------------------------------------------------------------
# --val-dir


def test_val_dir_is_validation_and_all_of_data_is_training(tmp_path: Path) -> None:
    tree(tmp_path, "photos/cat/1.png", "photos/dog/1.png", "held/out/dog/7.png")
    index = index_of(tmp_path / "photos", val_dir=str(tmp_path / "held" / "out"))
    assert [index.root / path for path in index.train.paths] == [
        tmp_path / "photos" / c / "1.png" for c in ("cat", "dog")
    ]
    assert [(index.root / path, target) for path, target in rows(index.val)] == [(tmp_path / "held/out/dog/7.png", 1)]


def test_val_dir_replaces_the_val_folder(tmp_path: Path) -> None:
    tree(tmp_path, *SPLIT, "test/cat/8.png", "other/dog/7.png")
    index = index_of(tmp_path, val_dir=str(tmp_path / "other"))
    assert rows(index.val) == [("other/dog/7.png", 1)]
    assert (len(index.train), len(index.test)) == (3, 0)


def test_val_dir_with_a_manifest(tmp_path: Path) -> None:
    tree(tmp_path, "lists/cat.png", "lists/dog.png", "other/dog/7.png")
    file = manifest(tmp_path / "lists" / "all.csv", "path,label\ncat.png,cat\ndog.png,dog\n")
    index = index_of(file, val_dir=str(tmp_path / "other"))
    assert {(index.root / path).resolve() for path in index.train.paths} == {
        file.with_name(f"{c}.png") for c in ("cat", "dog")
    }
    assert [(index.root / path, target) for path, target in rows(index.val)] == [(tmp_path / "other/dog/7.png", 1)]


def test_val_dir_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, *SPLIT, "other/emu/7.png")
    assert "val has class 'emu', which train does not have" in refusal(tmp_path, val_dir=str(tmp_path / "other"))
    assert "there is no such folder (--val-dir)" in refusal(tmp_path, val_dir=str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


@pytest.mark.parametrize(
    "text",
    [
        "path,label,split\na.png,x,train\nb.png,y,train\nc.png,y,val\n",
        "\ufeffpath,label,split\r\na.png,x,train\r\nb.png,y,train\r\nc.png,y,val\r\n",
        "note,split,label,path\n1,Training,x,a.png\n,TRAIN,y,b.png\n?, valid ,y,c.png\n",
        "path,label,split\n\na.png,x,train\n\nb.png,y,train\nc.png,y,test\n",
    ],
    ids=["plain", "BOM and CRLF", "other columns and order", "blank lines, test for val"],
)
def test_manifest_has_path_label_and_split(tmp_path: Path, text: str) -> None:
    index = index_of(manifest(tmp_path / "list.csv", text))
    assert (index.root, index.classes) == (tmp_path, ("x", "y"))
    assert rows(index.train) == [("a.png", 0), ("b.png", 1)]
    assert rows(index.val) == [("c.png", 1)]


def test_a_manifest_may_quote_commas_quotes_and_line_feeds(tmp_path: Path) -> None:
    text = 'path,label,split\n"a,1.png","x ""y""",train\n"b\n2.png",z,train\n"c/d,.png",z,val\n'
    index = index_of(manifest(tmp_path / "list.csv", text))
    assert index.classes == ('x "y"', "z")
    assert rows(index.train) == [("a,1.png", 0), ("b\n2.png", 1)]
    assert rows(index.val) == [("c/d,.png", 1)]


def test_a_manifest_without_split_is_split(tmp_path: Path) -> None:
    text = "path,label\n" + "".join(f"{name}{i}.png,{name}\n" for name in "xy" for i in range(10))
    index = index_of(manifest(tmp_path / "list.csv", text), val_split=0.3)
    assert np.bincount(index.val.targets).tolist() == [3, 3]
    assert not set(index.train.paths) & set(index.val.paths)
    assert len(index.train) == 14


def test_absolute_paths_in_a_manifest(tmp_path: Path) -> None:
    far = tmp_path / "far" / "a.png"
    (tmp_path / "near").mkdir()
    file = manifest(tmp_path / "near" / "list.csv", f"path,label,split\n{far},x,train\nb.png,y,train\nc.png,x,val\n")
    table = index_of(file).train
    assert [table.root / path for path in table.paths] == [far, tmp_path / "near" / "b.png"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path,split\na.png,train\n", "it has path,split"),
        ("path,label\n", "no images found"),
        ("path,label\na.png,x\nb.png,\n", "line 3: path and label must not be empty"),
        ("path,label,split\na.png,x,trian\n", "line 2: split 'trian' is not one of train, val, test"),
        ("path,label\na.png,x\nb.png,y\na.png,y\n", "line 4: 'a.png' is listed more than once, first in line 2"),
        ("path,label,split\na.png,x,train\nb.png,x,\nc.png,y,\n", "2 of 3 rows have no split"),
        ("path,label,split\na.png,x,val\nb.png,y,val\n", "at least two classes with training images"),
        (
            "path,label,split\na.png,x,train\nb.png,y,train\nc.png,z,val\n",
            "val has class 'z', which train does not have",
        ),
        (f"path,label\n{'a' * 200_000}.png,x\n", "line 2: not CSV"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    said = refusal(manifest(tmp_path / "list.csv", text))
    assert reason in said


# ---------------------------------------------------------------------------------------------------------------------
# Stored forms


@given(st.lists(st.binary(max_size=40).map(os.fsdecode)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_path_table_equals_its_list(paths: list[str]) -> None:
    table = PathTable(paths)
    assert len(table) == len(paths)
    assert list(table) == paths
    assert [table[i] for i in range(len(table))] == paths


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_read_part_inverts_write_manifest(tmp_path: Path, split: str) -> None:
    index = index_of(tree(tmp_path / "data", *SPLIT, "test/dog/9.png"))
    (tmp_path / "run").mkdir()
    write_manifest(tmp_path / "run" / "manifest.csv", index)
    part = read_part(tmp_path / "run" / "manifest.csv", split, index.classes, root=index.root)
    assert (part.root, rows(part)) == (index.root, rows(index.part(split)))


def test_read_part_uses_the_class_indices_of_the_model(tmp_path: Path) -> None:
    part = read_part(tree(tmp_path, *SPLIT), "val", ("emu", "dog", "cat"))
    assert rows(part) == [("val/cat/3.png", 2), ("val/dog/3.png", 1)]


def test_read_part_reads_data_without_splits_whole(tmp_path: Path) -> None:
    tree(tmp_path, "cat/1.png", "dog/2.png")
    file = manifest(tmp_path / "list.csv", "path,label\ncat/1.png,cat\ndog/2.png,dog\n")
    for data in (tmp_path, file):
        part = read_part(data, "test", ("cat", "dog"))
        assert (part.root, rows(part)) == (tmp_path, [("cat/1.png", 0), ("dog/2.png", 1)])


@pytest.mark.parametrize(
    ("data", "split", "classes", "reason"),
    [
        (".", "val", ("cat",), "the model does not have class 'dog'; it has 'cat'"),
        (".", "test", ("cat", "dog"), "no images in the test split"),
        ("nowhere", "val", ("cat", "dog"), "no such folder or manifest"),
    ],
)
def test_read_part_refuses(tmp_path: Path, data: str, split: str, classes: Sequence[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_part(tree(tmp_path, *SPLIT) / data, split, classes)


ROWS = ["a.png,x,train", "b.png,y,train", "c.png,x,val", "d.png,y,test"]


def fingerprint(folder: Path, lines: Sequence[str]) -> dict[str, Any]:
    folder.mkdir()
    return index_of(manifest(folder / "list.csv", "\n".join(["path,label,split", *lines]) + "\n")).fingerprint()


@pytest.mark.parametrize(
    ("line", "changed"),
    [(0, "A.png,x,train"), (3, "d.png,x,test"), (3, "d.png,y,val"), (0, "a.png,y,train")],
    ids=["path", "label", "split", "label in train"],
)
def test_the_fingerprint_changes_with_path_label_and_split(tmp_path: Path, line: int, changed: str) -> None:
    lines = [*ROWS, "e.png,x,train"]
    altered = [changed if i == line else text for i, text in enumerate(lines)]
    assert fingerprint(tmp_path / "one", lines)["sha256"] != fingerprint(tmp_path / "two", altered)["sha256"]


def test_the_fingerprint_changes_with_the_name_of_a_class(tmp_path: Path) -> None:
    renamed = [line.replace(",y,", ",z,") for line in ROWS]
    assert fingerprint(tmp_path / "one", ROWS) != fingerprint(tmp_path / "two", renamed)


def test_fingerprint_does_not_depend_on_folder_or_order(tmp_path: Path) -> None:
    one, two = fingerprint(tmp_path / "one", ROWS), fingerprint(tmp_path / "two", ROWS[::-1])
    assert one == two
    assert (one["classes"], one["images"]) == (["x", "y"], 4)


# ---------------------------------------------------------------------------------------------------------------------
# Rows for `resnet-dist split`


def test_class_rows_and_flat_rows(tmp_path: Path) -> None:
    tree(tmp_path, "a/cat.1.png", "a/dog.2.JPG", "b/dog.1.png", "b/x/cat.9.png", "b/notes.txt")
    assert class_rows(tmp_path) == [
        ("a/cat.1.png", "a"),
        ("a/dog.2.JPG", "a"),
        ("b/dog.1.png", "b"),
        ("b/x/cat.9.png", "b"),
    ]
    labels = [label for _, label in flat_rows(tmp_path, r"^(cat|dog)\.")]
    assert labels == ["cat", "dog", "dog", "cat"]


@pytest.mark.parametrize(
    ("files", "reason"), [(("cat.1.png", "emu.1.png"), "emu.1.png: --label-by"), ((), "no images")]
)
def test_flat_rows_refuses_a_name_without_label(tmp_path: Path, files: Sequence[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        flat_rows(tree(tmp_path, *files), "^(cat|dog)")


def test_rows_of_a_table(folder: Path) -> None:
    """Their files, any choice of them as a table, and a choice that is spread evenly."""
    table = read_index(DataConfig(data=str(folder))).train
    assert all(table.path(row).is_file() and table.path(row).name == Path(table.paths[row]).name for row in range(24))
    some = table.take([5, 0, 23])
    assert list(some.paths) == [table.paths[row] for row in (5, 0, 23)] and len(table.take([])) == 0
    assert some.targets.tolist() == [int(table.targets[row]) for row in (5, 0, 23)] and some.root == table.root
    assert table.spread(3) == [0, 12, 23] and table.spread(1) == [0]
    assert table.spread(24) == table.spread(1000) == list(range(24)) and some.take([]).spread(5) == []
