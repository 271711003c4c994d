"""Errors about a wrong folder name the folder that was probably meant; that folder can then be read."""

import re
from pathlib import Path

import pytest

from resnet_dist.config.schema import DataConfig
from resnet_dist.data.index import class_rows, read_index, read_part
from resnet_dist.errors import DataError

CLASSES = ("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png")
WHOLE = tuple(f"{split}/{file}" for split in ("train", "val", "test") for file in CLASSES)


def tree(root: Path, *files: str) -> Path:
    """Empty files below a root: an index never looks into an image."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def refusal(data: str) -> str:
    with pytest.raises(DataError) as caught:
        read_index(DataConfig(data=data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "given", "wanted"),
    [
        (tuple(f"photos/{file}" for file in CLASSES), ".", "photos"),
        (tuple(f"photos/{file}" for file in WHOLE), ".", "photos"),
        (tuple(f"a/b/{file}" for file in WHOLE), ".", "a/b"),
        ((*(f"a/b/{file}" for file in CLASSES), "readme.txt"), ".", "a/b"),
        (WHOLE, "train/ant", "."),
        (WHOLE, "train/ant/1.png", "."),
        (WHOLE, "train/ant/999.png", "."),
        (CLASSES, "ant", "."),
        (tuple(f"train/{file}" for file in CLASSES), "trian", "train"),
        (tuple(f"photos/{file}" for file in CLASSES), "fotos", "photos"),
        (tuple(f"test/{file}" for file in CLASSES), ".", "test"),
    ],
)
def test_the_folder_that_was_meant_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], given: str, wanted: str
) -> None:
    monkeypatch.chdir(tree(tmp_path, *files))
    said = re.search(r"; did you mean '(.*)'\?$", refusal(given))
    assert said is not None and Path(said[1]) == Path(wanted)
    if wanted != "test":
        assert read_index(DataConfig(data=said[1], val_split=0.5)).classes == ("ant", "bee")
    absolute = re.search(r"; did you mean '(.*)'\?$", refusal(str(tmp_path / given)))
    assert absolute is not None and Path(absolute[1]) == tmp_path / wanted


def test_splits_without_class_folders_are_named(tmp_path: Path) -> None:
    """Before, `train` and `val` became the classes."""
    said = refusal(str(tree(tmp_path, "train/1.png", "train/2.png", "val/3.png", "val/4.png")))
    assert said == f"{tmp_path}: no class folders found: 'train', 'val' must hold one sub-folder per class, not images"


def test_a_class_may_still_be_called_train(tmp_path: Path) -> None:
    data = tree(tmp_path, "bus/1.png", "bus/2.png", "train/1.png", "train/2.png")
    assert read_index(DataConfig(data=str(data), val_split=0.5)).classes == ("bus", "train")


def test_a_training_folder_names_the_splits_next_to_it(tmp_path: Path) -> None:
    tree(tmp_path, *WHOLE)
    alone = read_index(DataConfig(data=str(tmp_path / "train"), val_split=0.5))
    assert alone.notes[0] == (
        f"WARNING: {tmp_path / 'train'} is the training folder of a data set whose 'test', 'val' this run does not "
        f"use; give {tmp_path} to use all"
    )
    with_val = DataConfig(data=str(tmp_path / "train"), val_dir=str(tmp_path / "val"))
    assert read_index(with_val).notes == read_index(DataConfig(data=str(tmp_path))).notes == ()


def test_images_in_the_folder_itself_are_not_called_unreadable(tmp_path: Path) -> None:
    said = refusal(str(tree(tmp_path, "1.png", "2.png", "3.txt")))
    assert (
        "no images found in sub-folders, but 2 images directly in it (files that are not read as images: 1 .txt)"
        in said
    )


@pytest.mark.parametrize(("name", "said"), [("photos.zip", "an archive; unpack it"), ("one.jpg", "an image; give")])
def test_files_that_are_no_manifest(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"\x89PNG")
    assert refusal(str(tmp_path / name)).startswith(f"{tmp_path / name}: {said}")


def test_nothing_is_suggested_if_nothing_is_near(tmp_path: Path) -> None:
    tree(tmp_path / "one", "ant/1.png", "ant/2.png")
    for given in (tmp_path / "one", tmp_path / "zzz", tmp_path):
        assert "did you mean" not in refusal(str(given))


@pytest.mark.parametrize(("given", "wanted"), [(".", "photos"), ("photos/ant", "photos"), ("fotos", "photos")])
def test_split_names_the_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, wanted: str) -> None:
    """Before, `split` wrote a manifest whose only class was the folder."""
    monkeypatch.chdir(tree(tmp_path, *(f"photos/{file}" for file in CLASSES)))
    with pytest.raises(DataError, match=re.escape(f"; did you mean '{wanted}'?")):
        class_rows(Path(given))
    assert {label for _, label in class_rows(Path(wanted))} == {"ant", "bee"}


def test_evaluating_a_folder_around_the_data_names_it(tmp_path: Path) -> None:
    tree(tmp_path, *(f"photos/{file}" for file in CLASSES))
    with pytest.raises(
        DataError, match=re.escape(f"have class 'photos'; it has 'ant', 'bee'; did you mean '{tmp_path}")
    ):
        read_part(tmp_path, "val", ("ant", "bee"))
