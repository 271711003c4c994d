"""`--exclude-list`: images that a list takes out before the split."""

import os
from pathlib import Path

import pytest

from resnet_dist.cli.main import main
from resnet_dist.config.schema import DataConfig
from resnet_dist.data.index import ImageIndex, read_index
from resnet_dist.errors import DataError
from tests.conftest import TINY, make_folder

GONE = ["cat/train001.png", "dog/train003.png"]
FORMS = {
    "text": "\n".join(GONE),
    "text, blank lines, other line ends": "\r\n".join(["", *GONE, ""]),
    "text, dots": "\n".join(f"./{path}" for path in GONE),
    "predictions.csv": "path,target,p1\n" + "".join(f"{path},cat,0.5\n" for path in GONE),
    "csv, another order, with a mark": "\ufefflabel,path\n" + "".join(f'"a,b","{path}"\n' for path in GONE),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", train=5, val=0)


def index_of(data: Path, text: str | bytes) -> ImageIndex:
    file = data.parent / "list"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_index(DataConfig(data=str(data), exclude_list=str(file)))


@pytest.mark.parametrize("form", FORMS)
def test_listed_images_are_in_no_split(data: Path, form: str) -> None:
    index = index_of(data, FORMS[form])
    there = {str(path.relative_to(data)) for path in data.rglob("*.png")}
    assert set(index.train.paths) | set(index.val.paths) == there - set(GONE)
    assert "2 of 15 images left out (--exclude-list)" in index.notes


def test_excluding_files_equals_removing_them(data: Path) -> None:
    """The split is made of what is left, not the other way round."""
    excluded = index_of(data, FORMS["text"])
    for path in GONE:
        (data / path).unlink()
    removed = read_index(DataConfig(data=str(data)))
    assert list(excluded.train.paths) == list(removed.train.paths)
    assert excluded.fingerprint() == removed.fingerprint()


def test_any_name_can_be_listed(data: Path) -> None:
    name = os.fsdecode(b"cat/tr\xe4n=1 2.png")
    (data / "cat/train000.png").rename(data / name)
    assert name not in index_of(data, os.fsencode(name)).train.paths


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat/train001.png\ncat/nowhere.png", "'cat/nowhere.png' is not among the images"),
        ("path\ntrain001.png\n../x.png\n", "'../x.png', 'train001.png' are not among"),
        ("".join(f"cat/train{i:03d}.png\n" for i in range(5)), "no image of class 'cat' would be left"),
        ("path\n" + '"' + "x" * 200_000, "line 2: not CSV"),
    ],
    ids=["one unknown", "two unknown", "a whole class", "endless cell"],
)
def test_wrong_lists_are_refused(data: Path, text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        index_of(data, text)
    assert str(caught.value).startswith(str(data.parent / "list")) and said in str(caught.value)


def test_list_that_is_not_a_file_is_refused(data: Path) -> None:
    os.mkfifo(data.parent / "pipe")
    for name in ("nothing", "data", "pipe"):
        with pytest.raises(DataError, match=f"{name}: .*--exclude-list"):
            read_index(DataConfig(data=str(data), exclude_list=str(data.parent / name)))


def test_train_reports_and_records_remaining_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(GONE))
    options = [*TINY, "--exclude-list", str(tmp_path / "list.txt"), "--dry-run"]
    assert main(["train", str(data), *options]) == 0
    assert "2 of 15 images left out" in capsys.readouterr().out
