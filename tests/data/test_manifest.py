"""Manifests and lists that a user wrote by hand or by spreadsheet: what has two meanings is refused with its line."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnet_dist.cli.main import main
from resnet_dist.config.schema import DataConfig
from resnet_dist.data import check
from resnet_dist.data.check import refuse_one_file_twice, usable
from resnet_dist.data.exclude import read_paths
from resnet_dist.data.index import ImageIndex, ImageTable, PathTable, read_index, read_part, write_manifest
from resnet_dist.data.same_file import identities, of_one_file
from resnet_dist.errors import DataError
from tests.conftest import TINY, make_folder, write_image

NBSP, BOM, ZERO_WIDTH = "\u00a0", "\ufeff", "\u200b"


def manifest(place: Path, text: str) -> Path:
    file = place / "list.csv"
    file.write_bytes(text.encode(errors="surrogateescape"))
    return file


def index_of(data: Path, **options: Any) -> ImageIndex:
    return read_index(DataConfig(data=str(data), **options))


def refusal(data: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        index_of(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# One file in two rows


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """x/ and y/ of two images each; `link` leads to x, `near/deep` to y."""
    for name in ("x", "y"):
        for i in range(2):
            write_image(tmp_path / name / f"{i}.png", seed=10 * ord(name) + i)
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "deep").symlink_to(tmp_path / "y")
    return tmp_path


SPELLINGS = ["./x/0.png", "x/./0.png", "x//0.png", "y/../x/0.png", "{}/x/0.png", "{}/y/../x/0.png", "link/0.png"]
SPELLINGS += ["near/deep/../x/0.png"]  # y/.. , as deep is a link to y; read as text this would be near/x


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("columns", ["x,train", "y,train", "x,val"], ids=["again", "contradiction", "leak"])
def test_one_file_in_two_spellings_is_refused_with_both_lines(images: Path, spelling: str, columns: str) -> None:
    rows = ["x/0.png,x,train", "y/0.png,y,train", "y/1.png,y,val", f"{spelling.format(images)},{columns}"]
    said = refusal(manifest(images, "\n".join(["path,label,split", *rows])))
    assert f"line 5: '{spelling.format(images)}' is the same file as 'x/0.png' in line 2" in said


def test_path_through_a_link_is_resolved(images: Path) -> None:
    """near/deep/../0.png is in the parent of the link's target, so it is not near/0.png."""
    for place in (images / "0.png", images / "near" / "0.png"):
        write_image(place, seed=1)
    rows = ["near/0.png,x,train", "near/deep/../0.png,y,train", "x/0.png,x,val"]
    assert len(index_of(manifest(images, "\n".join(["path,label,split", *rows]))).train) == 2


def test_names_that_differ_in_case_are_one_file_if_the_file_system_says_so(images: Path) -> None:
    """A second name of the file simulates a file system that ignores case."""
    for name in ("0.PNG", "\u00e9.png"):
        write_image(images / "x" / name, seed=5)
    rows = ["x/0.png,x,train", "x/0.PNG,x,train", "y/0.png,y,train", "x/\u00e9.png,x,val", "x/e\u0301.png,x,val"]
    file = manifest(images, "\n".join(["path,label,split", *rows]))
    assert len(index_of(file).train) == 3
    (images / "x" / "0.PNG").unlink()
    os.link(images / "x" / "0.png", images / "x" / "0.PNG")
    assert "line 3: 'x/0.PNG' is the same file as 'x/0.png' in line 2" in refusal(file)
    (images / "x" / "0.PNG").unlink()
    os.link(images / "x" / "\u00e9.png", images / "x" / "e\u0301.png")
    assert "line 6: 'x/e\u0301.png' is the same file as 'x/\u00e9.png' in line 5" in refusal(file)


@pytest.mark.parametrize("how", [os.link, os.symlink])
def test_links_to_one_image_are_refused_in_train_and_eval(images: Path, how: Callable[[Path, Path], None]) -> None:
    how(images / "x" / "0.png", images / "y" / "other.png")
    rows = ["x/0.png,x,train", "y/0.png,y,train", "y/other.png,y,val", "x/1.png,x,val", "x/gone.png,x,val"]
    file = manifest(images, "\n".join(["path,label,split", *rows[:4]]))
    with pytest.raises(DataError, match=r"'x/0.png' \(x, train\) and 'y/other.png' \(y, val\) are links to one file"):
        usable(index_of(file), DataConfig(data=str(file)))
    file = manifest(images, "\n".join(["path,label,split", *rows]).replace("train", "val"))
    with pytest.raises(DataError, match=r"'x/0.png' and 'y/other.png' are links to one file"):
        read_part(file, "val", ("x", "y"))
    part = read_part(manifest(images, "path,label\nx/0.png,x\nx/gone.png,x\nx/gone2.png,x"), "val", ("x", "y"))
    assert len(part) == 3  # files that are not there are not one file; they are missed when they are opened


@pytest.mark.parametrize(
    ("link", "allowed"),
    [("train/cat/more.png", True), ("train/dog/more.png", False), ("val/cat/more.png", False)],
    ids=["more weight", "contradiction", "leak"],
)
def test_links_in_folders(tmp_path: Path, link: str, allowed: bool) -> None:
    """In one class and split a link gives an image more weight; elsewhere it is an image of two meanings."""
    data = make_folder(tmp_path / "data", train=2, val=1)
    (data / link).symlink_to(data / "train" / "cat" / "train000.png")
    cfg = DataConfig(data=str(data))
    if allowed:
        assert len(usable(read_index(cfg), cfg)[0].train) == 7
    else:
        with pytest.raises(DataError, match="are links to one file"):
            usable(read_index(cfg), cfg)


def test_test_images_used_for_validation_give_a_warning(tmp_path: Path) -> None:
    """`ln -s test val`, as without val/; the test images are no training images all the same."""
    data = make_folder(tmp_path / "data", train=2, val=2)
    (data / "val").rename(data / "test")
    (data / "val").symlink_to("test")
    cfg = DataConfig(data=str(data))
    index, _ = usable(read_index(cfg), cfg)
    assert (len(index.val), len(index.test)) == (6, 6)
    (warning,) = [note for note in index.notes if note.startswith("WARNING")]
    assert "val/cat/val000.png and test/cat/val000.png are links to one file" in warning
    assert warning.endswith("its score is not a test score")
    (data / "test" / "dog" / "z.png").symlink_to(data / "test" / "emu" / "val001.png")
    with pytest.raises(DataError, match=r"\(emu, (val|test)\) and '.*' \(dog|\(dog, val\) and '.*' \(emu"):
        usable(read_index(cfg), cfg)
    (data / "test" / "dog" / "z.png").unlink()
    (data / "test" / "dog" / "z.png").symlink_to(data / "train" / "dog" / "train000.png")
    with pytest.raises(DataError, match=r"'train/dog/train000.png' \(dog, train\) and 'val/dog/z.png' \(dog, val\)"):
        usable(read_index(cfg), cfg)


def test_links_to_one_inode_are_found_among_many_files(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / str(i)).touch()
    for i, target in ((50, 7), (51, 30), (52, 7)):
        os.link(tmp_path / str(target), tmp_path / str(i))
    found = identities(tmp_path, [str(i) for i in range(55)])
    assert (found.dtype, found.shape) == (np.uint64, (55, 2))
    assert of_one_file(found).tolist() == [[7, 50], [30, 51], [7, 52]], "each with the first of its file"
    assert of_one_file(found[:0]).tolist() == []


def test_many_links_to_one_file_take_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """2000 names of one file in one split and class: 2 million pairs."""
    names = PathTable([f"cat/{i}" for i in range(2000)])
    train = ImageTable(Path("/nowhere"), names, np.zeros(len(names), np.int64))
    none = ImageTable(train.root, PathTable([]), np.zeros(0, np.int64))
    index = ImageIndex(train.root, ("cat", "dog"), train, none, none)
    found = np.full((len(names), 2), 1, np.uint64)
    started = time.process_time()
    refuse_one_file_twice(index, found, may_repeat=True)
    assert time.process_time() - started < 2
    monkeypatch.setattr(check, "is_same", lambda one, other: True)
    train.targets[1500] = 1
    with pytest.raises(DataError, match=r"'cat/0' \(cat, train\) and 'cat/1500' \(dog, train\) are links to one file"):
        refuse_one_file_twice(index, found, may_repeat=True)


# Labels


def labelled(place: Path, *labels: str) -> Path:
    rows = [f'{i}.png,"{label}",train' for i, label in enumerate([*labels, *labels, "y"])]
    return manifest(place, "\n".join(["path,label,split", *rows, "v.png,y,val"]))


@pytest.mark.parametrize("around", [" ", "  ", "\t", NBSP, BOM, ZERO_WIDTH, "\u3000", f" {NBSP}\n"], ids=ascii)
def test_spaces_around_a_label_are_removed_with_a_warning(tmp_path: Path, around: str) -> None:
    for label in (f"x{around}", f"{around}x"):
        index = index_of(labelled(tmp_path, "x", label))
        assert index.classes == ("x", "y")
        (warning,) = [note for note in index.notes if "spaces around labels" in note]
        assert warning.startswith("WARNING") and f"line 3: {label!a}" in warning
    part = read_part(labelled(tmp_path, "x", f"x{around}"), "train", ("x", "y"))
    assert part.targets.tolist() == [0, 0, 0, 0, 1] and "spaces around labels" in part.notes[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [("sea gull", "sea  gull"), ("sea gull", f"sea{NBSP}gull"), ("\u00e9mu", "e\u0301mu"), ("xx", f"x{ZERO_WIDTH}x")],
    ids=ascii,
)
def test_labels_that_look_the_same_are_refused(tmp_path: Path, one: str, other: str) -> None:
    said = refusal(labelled(tmp_path, one, other))
    assert f"line 3: the label {other!a} looks the same as {one!a} in line 2" in said


@pytest.mark.parametrize("label", ["", " ", NBSP, f"{BOM}{ZERO_WIDTH}"], ids=ascii)
def test_label_of_spaces_is_empty(tmp_path: Path, label: str) -> None:
    assert "line 2: path and label must not be empty" in refusal(labelled(tmp_path, label))


def test_labels_that_only_look_similar_are_kept(tmp_path: Path) -> None:
    """Case is a warning; letters of other alphabets and the blanks of a folder's name are the user's."""
    index = index_of(labelled(tmp_path, "Cat", "cat", "c\u0430t", "sea gull"))
    assert len(index.classes) == 5 and any("differ only in case" in note for note in index.notes)
    for name in ("x", "x "):
        for i in range(5):
            write_image(tmp_path / "folders" / name / f"{i}.png", seed=i)
    index = index_of(tmp_path / "folders")
    assert index.classes == ("x", "x ") and any("in spaces" in note for note in index.notes)
    (tmp_path / "run").mkdir()
    write_manifest(tmp_path / "run" / "manifest.csv", index)
    part = read_part(tmp_path / "run" / "manifest.csv", "train", index.classes, root=index.root)
    assert list(part.paths) == list(index.train.paths), "the program's own manifests are taken to the letter"
    assert part.targets.tolist() == index.train.targets.tolist()


# Lines, cells, headers


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("path,label\na.png,x\nb.png,\n", 3),
        ("path,label\n\n\na.png,x\n\nb.png,\n", 6),
        ("\n\npath,label\na.png,x\nb.png,\n", 5),
        ("path,label\r\n\r\na.png,x\r\nb.png,\r\n", 4),
        ("path,label\ra.png,x\rb.png,\r", 3),
        ('path,label\n"a\nb\n\n.png",x\nb.png,\n', 6),
        ('path,label\n"a\nb.png",\n', 2),
        ('"path",label\n"a\n.png",x\n\n"b\n.png",\n', 5),
    ],
)
def test_line_numbers_are_those_of_an_editor(tmp_path: Path, text: str, line: int) -> None:
    assert refusal(manifest(tmp_path, text)).startswith(f"{tmp_path / 'list.csv'}, line {line}: path and label")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path,label\na, b.jpg,x\n", "line 2: 3 cells, but the header has 2 columns"),
        ("path,label\na.png,x,\n", "line 2: 3 cells"),
        ("path,label,split\na.png,x,train\nb.png,x\n", "line 3: 2 cells, but the header has 3 columns"),
        ("path,label\na.png\n", "line 2: 1 cells"),
        ('path,label\n"a.png,x\nb.png,y\n', "line 2: not CSV"),
        ('path,label\na.png,x\n"b.png"x,y\n', "line 3: not CSV"),
        ("path,label\na\0.png,x\n", "line 2: the path contains a NUL character"),
        ("path,label,label\na.png,x,y\n", "line 1: the column 'label' is in the header more than once"),
        ("path, path,label\na.png,b.png,y\n", "line 1: the column 'path' is in the header more than once"),
        ("path;label;split\na.png;x;train\n", "line 1: the header needs the columns path,label; its columns are sep"),
        ("path\tlabel\na.png\tx\n", "separated by tabs: save it with commas"),
        ("a.png,x\nb.png,y\n", "the header needs the columns path,label; it has a.png,x"),
        (",\n", "list.csv: empty; a header with the columns path,label is needed"),
        ("\n\n", "list.csv: empty; a header with the columns path,label is needed"),
        ("", "list.csv: empty"),
        ("path,label,split\na.png,x,train\n\nb.png,x,\n", "1 of 2 rows have no split, the first in line 4"),
    ],
)
def test_wrong_rows_and_headers_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refusal(manifest(tmp_path, text))


@pytest.mark.parametrize("line", ["", "  ", "\t", ",,", " , ,\t", ",,,,", ",", '"",,'], ids=ascii)
def test_lines_without_text_are_skipped(tmp_path: Path, line: str) -> None:
    rows = [line, "path,label,split", line, "a.png,x,train", line, "b.png,y,train", "c.png,y,val", line, line]
    index = index_of(manifest(tmp_path, "\n".join(rows)))
    assert list(index.train.paths) == ["a.png", "b.png"] and list(index.val.paths) == ["c.png"]
    assert "line 10: path and label must not be empty" in refusal(manifest(tmp_path, "\n".join([*rows, ",y,val"])))
    assert read_paths(manifest(tmp_path, "\n".join(["path,label,split", "a.png,x,", line, "b.png,y,"]))) == [
        "a.png",
        "b.png",
    ]


def test_utf_16_is_named(tmp_path: Path) -> None:
    """What a spreadsheet calls Unicode text."""
    (tmp_path / "list.csv").write_bytes("path,label\na.png,x\n".encode("utf-16"))
    assert "not UTF-8 text (UTF-16?)" in refusal(tmp_path / "list.csv")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_paths(tmp_path / "list.csv")


def test_other_columns_are_ignored(tmp_path: Path) -> None:
    """The number of the row that pandas writes without a name, columns of one name, blanks in the header."""
    text = ",note,note, path ,label,split\n0,a,b,a.png,x,train\n1,,,b.png,y,train\n2,,,c.png,y,val\n"
    assert [list(index_of(manifest(tmp_path, text)).part(split).paths) for split in ("train", "val")] == [
        ["a.png", "b.png"],
        ["c.png"],
    ]


# Lists of images to leave out


@pytest.mark.parametrize("spelling", ["./cat/train001.png", "dog/../cat/train001.png", "{}/cat/train001.png"])
@pytest.mark.parametrize("form", ["{}\n", "note,path\n,{}\n"])
def test_list_may_spell_paths_in_any_way(tmp_path: Path, spelling: str, form: str) -> None:
    data = make_folder(tmp_path / "data", train=3, val=0)
    file = manifest(tmp_path, form.format(spelling.format(data)))
    index = index_of(data, exclude_list=str(file))
    assert len(index.train) + len(index.val) == 8 and "cat/train001.png" not in [*index.train.paths, *index.val.paths]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path,note\n\na.png\n", "line 3: 1 cells"),
        ("path,note\na, b.png,x\n", "line 2: 3 cells"),
        ("path,note\n\n" + '" ",x\n', "line 3: the path is empty"),
        ("path,path\na,b\n", "the column 'path' is in the header more than once"),
        ("path;label\na.png;x\n", "separated by semicolons"),
        ('path\n"a.png\n', "line 2: not CSV"),
    ],
)
def test_wrong_exclude_lists_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DataError, match="--exclude-list") as caught:
        read_paths(manifest(tmp_path, text))
    assert reason in str(caught.value)


def test_only_line_feeds_end_a_line_of_a_list(tmp_path: Path) -> None:
    """Not at other characters that Unicode counts as ends of lines, which names may hold."""
    names = ["a\u2028b.png", "c\x85d.png", "e\x0bf.png"]
    assert read_paths(manifest(tmp_path, "\r\n".join(names))) == names
    assert read_paths(manifest(tmp_path, "path\n" + "\n".join(names))) == names


# The program


def test_command_line_prints_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    data = make_folder(tmp_path / "data", train=4, val=0)
    assert main(["split", str(data), str(tmp_path / "s.csv")]) == 0
    with (tmp_path / "s.csv").open("a") as stream:
        stream.write("./data/cat/train001.png,dog,val\n")
    for arguments in (["train", tmp_path / "s.csv", *TINY, "--dry-run"], ["check", tmp_path / "s.csv", "--no-cache"]):
        (said,) = refused(3, *arguments).splitlines()
        assert "line 14: './data/cat/train001.png' is the same file as 'data/cat/train001.png'" in said
