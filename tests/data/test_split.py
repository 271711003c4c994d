"""Train, val and test parts: shares, groups, stability, and `resnet-dist split` on real files."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.cli.main import main
from resnet_dist.config.schema import DataConfig
from resnet_dist.data.index import ImageIndex, read_index
from resnet_dist.data.split import assign
from resnet_dist.errors import DataError
from tests.conftest import make_folder, write_image


def images(**sizes: int) -> tuple[list[str], list[str]]:
    """Paths and labels with the given number of images per class."""
    pairs = [(f"{label}/{i:04d}.jpg", label) for label, size in sizes.items() for i in range(size)]
    return [path for path, _ in pairs], [label for _, label in pairs]


def counts(labels: Sequence[str], parts: Sequence[str], part: str) -> dict[str, int]:
    return dict(Counter(label for label, its_part in zip(labels, parts, strict=True) if its_part == part))


# ---------------------------------------------------------------------------------------------------------------------
# assign


@pytest.mark.parametrize(
    ("shares", "val", "test"),
    [
        ({"val": 0.2}, {"a": 20, "b": 3, "c": 1}, {}),
        ({"val": 0.2, "test": 0.1}, {"a": 20, "b": 3, "c": 1}, {"a": 10, "b": 1, "c": 1}),
        ({"val": 0.33, "test": 0.0}, {"a": 33, "b": 5, "c": 1}, {}),
        ({"val": 0.0, "test": 0.01}, {}, {"a": 1, "b": 1, "c": 1}),
        ({"val": 0.6, "test": 0.1}, {"a": 60, "b": 8, "c": 2}, {"a": 10, "b": 1, "c": 1}),
    ],
)
def test_split_is_stratified(shares: dict[str, float], val: dict[str, int], test: dict[str, int]) -> None:
    """Rounded, and at least one: counted by hand for classes of 100, 14 and 4."""
    paths, labels = images(a=100, b=14, c=4)
    parts = assign(paths, labels, shares, seed=3)
    assert counts(labels, parts, "val") == val
    assert counts(labels, parts, "test") == test
    assert set(parts) <= {"train", "val", "test"}


@given(st.lists(st.integers(3, 40), min_size=1, max_size=5), st.floats(0.01, 0.4), st.floats(0.01, 0.4), st.integers())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_class_is_in_every_split_or_it_is_an_error(sizes: list[int], val: float, test: float, seed: int) -> None:
    paths, labels = images(**{f"c{i}": size for i, size in enumerate(sizes)})
    fits = all(max(1, round(val * size)) + max(1, round(test * size)) < size for size in sizes)
    if not fits:
        with pytest.raises(DataError, match="too few for train and val and test"):
            assign(paths, labels, {"val": val, "test": test}, seed)
        return
    parts = assign(paths, labels, {"val": val, "test": test}, seed)
    assert set(zip(labels, parts, strict=True)) == {(c, p) for c in set(labels) for p in ("train", "val", "test")}


@pytest.mark.parametrize("group_by", [None, r"00(\d)"])
def test_split_does_not_depend_on_file_order(group_by: str | None) -> None:
    paths, labels = images(a=60, b=35)
    shuffled = random.Random(1).sample(list(zip(paths, labels, strict=True)), k=95)
    first = dict(zip(paths, assign(paths, labels, {"val": 0.3}, 0, group_by), strict=True))
    again = assign([path for path, _ in shuffled], [label for _, label in shuffled], {"val": 0.3}, 0, group_by)
    assert first == dict(zip([path for path, _ in shuffled], again, strict=True))


def test_split_depends_on_the_seed() -> None:
    """Another seed draws another part: two draws of 50 from 100 share 25 on average, standard deviation 2.5."""
    paths, labels = images(a=100)
    draws = [
        {p for p, part in zip(paths, assign(paths, labels, {"val": 0.5}, seed), strict=True) if part == "val"}
        for seed in range(5)
    ]
    assert all(10 <= len(one & two) <= 40 for one in draws for two in draws if one is not two)
    assert assign(paths, labels, {"val": 0.5}, 0) == assign(paths, labels, {"val": 0.5}, 0)


@pytest.mark.parametrize("added", [1, 5, 40])
@pytest.mark.parametrize("seed", range(5))
def test_added_images_move_few_of_the_old_ones(added: int, seed: int) -> None:
    """At most as many as were added, in any class; a fresh random draw of 0.2 would move 0.32 of them."""
    paths, labels = images(a=200, b=100)
    new = [f"a/new{i}.jpg" for i in range(added)]
    before = assign(paths, labels, {"val": 0.2}, seed)
    after = assign(paths + new, labels + ["a"] * added, {"val": 0.2}, seed)
    moved = [label for label, old, now in zip(labels, before, after, strict=False) if old != now]
    assert len(moved) <= added
    assert "b" not in moved


@pytest.mark.parametrize("pattern", [r"p(\d+)_", r"p\d+_", r"(p)(\d+)_"])
def test_groups_stay_together(pattern: str) -> None:
    """Forty patients of five images, the shares as near as whole patients allow."""
    paths = [f"{'ab'[patient % 2]}/p{patient}_{i}.jpg" for patient in range(40) for i in range(5)]
    labels = [path[0] for path in paths]
    parts = assign(paths, labels, {"val": 0.25, "test": 0.1}, 7, pattern)
    for patient in range(40):
        assert len(set(parts[5 * patient : 5 * patient + 5])) == 1
    assert all(23 <= counts(labels, parts, "val")[label] <= 27 for label in "ab")
    assert all(8 <= counts(labels, parts, "test")[label] <= 12 for label in "ab")


@pytest.mark.parametrize(("groups", "size"), [(2, 5), (3, 4), (4, 10), (10, 3)])
def test_every_part_has_a_group_if_there_are_enough_groups(groups: int, size: int) -> None:
    """Few, large groups too, of which one exceeds the share."""
    paths = [f"{label}/{label}{group}_{i}.jpg" for label in "ab" for group in range(groups) for i in range(size)]
    labels = [path[0] for path in paths]
    parts = assign(paths, labels, {"val": 0.2}, 0, r"[ab]\d+_")
    assert set(zip(labels, parts, strict=True)) == {(c, p) for c in "ab" for p in ("train", "val")}


def test_a_path_without_a_match_is_a_group_of_its_own() -> None:
    paths, labels = images(a=50)
    assert assign(paths, labels, {"val": 0.2}, 0, "a/0000") == assign(paths, labels, {"val": 0.2}, 0)


@pytest.mark.parametrize(
    ("sizes", "shares", "group_by", "reason"),
    [
        ({"a": 9, "b": 1}, {"val": 0.2}, None, "class 'b' has 1 image: too few for train and val"),
        (
            {"a": 9, "b": 2},
            {"val": 0.2, "test": 0.2},
            None,
            "class 'b' has 2 images: too few for train and val and test",
        ),
        ({"a": 9}, {"val": 0.97}, None, "class 'a' has 9 images: too few for train and val in these shares"),
        ({"a": 9, "b": 9}, {"val": 0.2}, r"^(a)/", "class 'a' has too few groups: none is left for val"),
    ],
)
def test_too_few_images_or_groups_are_refused(
    sizes: dict[str, int], shares: dict[str, float], group_by: str | None, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        assign(*images(**sizes), shares, 0, group_by)


# ---------------------------------------------------------------------------------------------------------------------
# resnet-dist split


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three class folders of ten images each."""
    return make_folder(tmp_path / "photos", train=10, val=0)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file below a folder."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def split_index(out: Path) -> ImageIndex:
    return read_index(DataConfig(data=str(out)))


def sizes(index: ImageIndex) -> tuple[int, int, int]:
    return len(index.train), len(index.val), len(index.test)


@pytest.mark.parametrize(("how", "name"), [("manifest", "split.csv"), ("link", "split"), ("copy", "split")])
def test_split_output_can_be_trained_on_and_sources_are_unchanged(photos: Path, how: str, name: str) -> None:
    before, out = contents(photos), photos.parent / name
    assert main(["split", str(photos), str(out), "--how", how, "--val", "0.2", "--test", "0.1"]) == 0
    assert contents(photos) == before
    index = split_index(out)
    assert (index.classes, sizes(index)) == (("cat", "dog", "emu"), (21, 6, 3))
    hashes = Counter(
        (index.classes[target], hashlib.sha256((part.root / path).read_bytes()).hexdigest())
        for part in (index.train, index.val, index.test)
        for path, target in zip(part.paths, part.targets, strict=True)
    )
    assert hashes == Counter((path.split("/")[0], digest) for path, (digest, _) in before.items())


def test_split_prints_its_result(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.parent / "split.csv"
    assert main(["split", str(photos), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 30 images of 3 classes: 24 train, 6 val\n"


@pytest.mark.parametrize("how", ["link", "copy"])
def test_link_mode_makes_links_and_copy_mode_makes_files(photos: Path, how: str) -> None:
    out = photos.parent / "split"
    assert main(["split", str(photos), str(out), "--how", how]) == 0
    files = list(out.rglob("*.png"))
    assert len(files) == 30
    assert {file.is_symlink() for file in files} == {how == "link"}


@pytest.mark.parametrize("where", ["beside", "inside", "far"])
def test_manifest_paths_are_relative_to_the_manifest(photos: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the source is relative to the working directory."""
    monkeypatch.chdir(photos.parent)
    out = {"beside": photos.parent, "inside": photos, "far": photos.parent / "far"}[where] / "split.csv"
    out.parent.mkdir(exist_ok=True)
    assert main(["split", "photos", str(out)]) == 0
    index = split_index(out)
    assert sizes(index) == (24, 6, 0)
    assert all((index.root / path).is_file() for path in index.train.paths)
    assert Path(index.train.paths[0]).is_absolute() == (where == "far")


def test_same_seed_gives_the_same_manifest_and_another_seed_does_not(photos: Path) -> None:
    outs = [photos.parent / f"{i}.csv" for i in range(3)]
    for out, seed in zip(outs, ("5", "5", "6"), strict=True):
        assert main(["split", str(photos), str(out), "--seed", seed]) == 0
    one, again, other = (out.read_bytes() for out in outs)
    assert one == again != other


@pytest.mark.parametrize(("how", "name"), [("manifest", "split.csv"), ("copy", "split")])
def test_label_by_on_a_flat_folder(tmp_path: Path, how: str, name: str) -> None:
    for i in range(5):
        for label in ("cat", "dog"):
            write_image(tmp_path / "flat" / f"{label}.{i}.png", seed=i)
    out = tmp_path / name
    assert main(["split", str(tmp_path / "flat"), str(out), "--label-by", r"^(cat|dog)\.", "--how", how]) == 0
    index = split_index(out)
    assert (index.classes, sizes(index)) == (("cat", "dog"), (8, 2, 0))
    for path, target in zip(index.train.paths, index.train.targets, strict=True):
        assert Path(path).name.startswith(index.classes[target])


def test_group_by_keeps_patients_in_one_split(tmp_path: Path) -> None:
    for i in range(24):
        write_image(tmp_path / "scans" / "ab"[i % 2] / f"patient{i // 4}_{i}.png", seed=i)
    out = tmp_path / "split.csv"
    assert main(["split", str(tmp_path / "scans"), str(out), "--val", "0.34", "--group-by", r"patient(\d+)"]) == 0
    index = split_index(out)
    patients = [{Path(path).name.split("_")[0] for path in part.paths} for part in (index.train, index.val)]
    assert not patients[0] & patients[1]
    assert sizes(index) == (16, 8, 0)


@pytest.mark.parametrize("how", ["link", "copy"])
def test_files_with_equal_names_in_sub_folders_are_all_kept(tmp_path: Path, how: str) -> None:
    """However the folders are called: 'a_b' and 'a/b' would be one name if joined."""
    places = [f"{label}/{place}" for label in ("cat", "dog") for place in ("", "a", "b", "a_b", "a/b", "c_a", "c/a")]
    for seed, place in enumerate(places):
        write_image(tmp_path / "photos" / place / "0.png", seed)
    out = tmp_path / "split"
    assert main(["split", str(tmp_path / "photos"), str(out), "--how", how]) == 0
    kept = Counter(file.read_bytes() for file in out.rglob("*.png"))
    assert kept == Counter(file.read_bytes() for file in (tmp_path / "photos").rglob("*.png"))


@pytest.mark.parametrize(("how", "name"), [("manifest", "out.csv"), ("link", "out"), ("copy", "out")])
def test_nothing_is_overwritten(photos: Path, refused: Callable[..., str], how: str, name: str) -> None:
    out = photos.parent / name
    out.write_text("mine")
    assert "nothing is overwritten" in refused(2, "split", photos, out, "--how", how)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("code", "arguments", "reason"),
    [
        (2, [], "SOURCE and OUT are needed"),
        (2, ["photos", "out"], "the name of a manifest must end in .csv"),
        (2, ["photos", "out.csv", "--val", "0.7", "--test", "0.4"], "their sum must be between 0 and 1"),
        (2, ["photos", "out.csv", "--val", "0"], "their sum must be between 0 and 1"),
        (2, ["photos", "out.csv", "--label-by", "^cat"], "has no group"),
        (2, ["photos", "out.csv", "--group-by", "("], "is not a regular expression"),
        (2, ["photos", "photos/out", "--how", "copy"], "photos/out: it is inside photos"),
        (2, ["photos", "photos/cat/../new/out", "--how", "link"], "it is inside photos"),
        (2, ["photos/cat/train000.png", "out.csv"], "SOURCE must be a folder"),
        (2, ["photos", "out.csv", "--group-by", "patient"], "--group-by 'patient' matches none of the 30 paths"),
        (3, ["nowhere", "out.csv"], "nowhere: cannot be listed"),
        (3, ["photos/cat", "out.csv"], "no images found"),
        (3, ["photos", "out.csv", "--label-by", "^(lion)"], "finds no label in this name"),
        (3, ["photos", "out.csv", "--val", "0.95"], "too few for train and val"),
        (4, ["photos", "no/such/folder.csv"], "cannot be written"),
    ],
)
def test_split_refuses_in_one_line(
    photos: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(photos.parent)
    said = refused(code, "split", *arguments)
    assert reason in said
    assert len(said.splitlines()) == 1
    assert sorted(file.name for file in photos.parent.iterdir()) == ["photos"]


@pytest.mark.parametrize("how", ["manifest", "copy"])
@pytest.mark.parametrize("parts", [("train", "val"), ("Training", "test"), ("train",), ("test", "valid")])
def test_a_folder_that_is_split_is_refused(
    tmp_path: Path, refused: Callable[..., str], parts: Sequence[str], how: str
) -> None:
    """Its parts are no classes; one of them can be split."""
    for seed, part in enumerate(parts):
        for name in ("cat", "dog"):
            for i in range(3):
                write_image(tmp_path / "photos" / part / name / f"{name}{i}.png", seed)
    out = tmp_path / ("out.csv" if how == "manifest" else "out")
    for more in ([], ["--label-by", "^(cat|dog)"]):
        said = refused(2, "split", tmp_path / "photos", out, "--how", how, *more)
        assert "it is already split" in said and str(tmp_path / "photos" / parts[0]) in said
    assert main(["split", str(tmp_path / "photos" / parts[0]), str(out), "--how", how]) == 0


def test_split_refuses_an_image_listed_twice(photos: Path, refused: Callable[..., str]) -> None:
    (photos / "dog" / "link.png").symlink_to(photos / "cat" / "train003.png")
    said = refused(3, "split", photos, photos.parent / "out.csv")
    assert "'cat/train003.png' and 'dog/link.png' are links to one file" in said


def test_spaces_around_labels_from_names_are_removed(tmp_path: Path, refused: Callable[..., str]) -> None:
    for i in range(6):
        write_image(tmp_path / "flat" / f"cat{' ' * (i % 2)}{i}.png", seed=i)
        write_image(tmp_path / "flat" / f"dog{i}.png", seed=10 + i)
    assert main(["split", str(tmp_path / "flat"), str(tmp_path / "s.csv"), "--label-by", r"^(\D+)"]) == 0
    assert split_index(tmp_path / "s.csv").classes == ("cat", "dog")
    write_image(tmp_path / "flat" / "\u00e9mu.png", seed=20)
    write_image(tmp_path / "flat" / "e\u0301mu.png", seed=21)
    said = refused(3, "split", tmp_path / "flat", tmp_path / "t.csv", "--label-by", r"^([^\d.]+)")
    assert "look the same" in said and "\\xe9mu" in said


def test_images_without_a_group_give_a_warning(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(photos), str(photos.parent / "s.csv"), "--group-by", r"cat/train00[01]"]) == 0
    assert "WARNING: --group-by 'cat/train00[01]' matches 2 of 30 paths" in capsys.readouterr().out
