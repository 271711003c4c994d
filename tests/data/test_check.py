"""`resnet-dist check` and what `train` does with images that cannot be used."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.cli.main import main
from resnet_dist.config.schema import DataConfig
from resnet_dist.data.check import Cache, Report, look_at_all, near_pairs, report_on
from resnet_dist.data.index import read_index
from tests.conftest import TINY, make_folder, write_image

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", train=4, val=3)


def photo(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A smooth picture, which survives being saved as JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def report_of(data: Path, full: bool = True) -> Report:
    return report_on(look_at_all(read_index(DataConfig(data=str(data))), full))


def spoil(data: Path) -> dict[str, str]:
    """One file of each kind that cannot be used, and a word from its error message."""
    good = (data / "train/cat/train000.png").read_bytes()
    files = {
        "empty.png": (b"", "not an image"),
        "text.jpg": (b"hello", "not an image"),
        "truncated.png": (good[:-300], "truncated"),
        "page.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }
    for name, (content, _) in files.items():
        (data / "train/cat" / name).write_bytes(content)
    Image.new("1", (9000, 9000)).save(data / "train/cat/bomb.png")
    return {**{name: word for name, (_, word) in files.items()}, "bomb.png": "more than the limit"}


def test_unusable_files_are_all_listed(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    expected = spoil(data)
    assert main(["check", str(data), "--report", str(tmp_path / "report.json")]) == 3
    said = capsys.readouterr().out
    found = {Path(e["path"]).name: e["error"] for e in json.loads((tmp_path / "report.json").read_text())["errors"]}
    assert set(found) == set(expected)
    for name, word in expected.items():
        assert word in found[name] and f"{name}: " in said


def test_good_data_has_no_findings(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(data)]) == 0
    assert "21 images, 0 that cannot be used" in capsys.readouterr().out


def test_leaks_and_contradictions(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes in train and val, under two labels, and a copy that was only saved again."""
    photo(1).save(data / "train/cat/a.png")
    shutil.copy(data / "train/cat/a.png", data / "val/cat/b.png")
    shutil.copy(data / "train/cat/a.png", data / "train/dog/c.png")
    photo(2).save(data / "train/emu/d.png")
    photo(2).resize((100, 80)).save(data / "val/emu/e.jpg", quality=80)
    assert main(["check", str(data)]) == 0
    said = capsys.readouterr().out
    assert "1 group of identical files, 1 pair of images that look alike" in said
    assert "LEAK: identical files in several splits: 1" in said
    assert "look alike in several splits: 1" in said and "train/emu/d.png = val/emu/e.jpg" in said
    assert "CONTRADICTION: identical files under several labels: 1" in said


def test_different_pictures_do_not_look_alike(data: Path) -> None:
    for number in range(30):
        photo(100 + number).save(data / f"train/cat/p{number}.jpg")
    assert report_of(data).near_duplicates == []


def test_round_objects_of_different_colours_do_not_look_alike(data: Path) -> None:
    for name, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30))):
        image = photo(7).convert("L")
        Image.merge("RGB", [image.point(lambda v, c=c: v * c // 255) for c in colour]).save(
            data / f"train/cat/{name}.png"
        )
    assert report_of(data).near_duplicates == []


@pytest.mark.parametrize("seed", range(5))
def test_near_pairs_equal_brute_force(seed: int) -> None:
    """With many hashes one to five bits apart, and the hashes of even surfaces left out."""
    random = np.random.default_rng(seed)
    hashes = [int(value) for value in random.integers(0, 2**63, 40)] + [0, 0, 2**64 - 1]
    for value in hashes[:30]:
        changed = value
        for bit in random.choice(64, random.integers(0, 6), replace=False):
            changed ^= 1 << int(bit)
        hashes.append(changed)
    even = {0, 2**64 - 1}
    expected = [
        (a, b)
        for a, b in combinations(range(len(hashes)), 2)
        if not {hashes[a], hashes[b]} & even and bin(hashes[a] ^ hashes[b]).count("1") <= 3
    ]
    assert list(near_pairs(hashes)) == expected and len(expected) >= 10


def test_odd_files_are_counted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(3).save(data / "train/cat/turned.jpg", exif=exif)
    photo(4).save(data / "train/cat/really_png.jpg", format="PNG")
    photo(5).convert("L").save(data / "train/cat/grey.png")
    write_image(data / "train/cat/wide.png", seed=1, size=(400, 40))
    assert main(["check", str(data), "--report", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rotated"] == 1 and found["modes"]["L"] == 1
    assert [Path(path).name for path in found["wrong_extension"]] == ["really_png.jpg"]
    assert found["aspect_ratio"]["max"] == 10 and found["short_side"]["max"] == 90
    assert len(found["tiny"]) == 21
    # 400x40 is seen as a central square of 224/256 of 40 pixels; the others keep (224/256)^2 * short/long.
    shares = [1 - (7 / 8) ** 2 * min(w, h) / max(w, h) for w, h in [(24, 20)] * 21 + [(120, 90)] * 3 + [(400, 40)]]
    assert found["crop"]["mean_share_cut"] == pytest.approx(np.mean(shares))
    assert found["crop"]["images_cut_by_half"] == sum(share > 0.5 for share in shares) == 1


def test_findings_are_cached_until_a_file_changes(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resnet_dist.data.check as check

    index = read_index(DataConfig(data=str(data)))
    first = Cache(tmp_path / "c.json")
    expected = look_at_all(index, True, first)
    first.save()
    looked = []
    real = check.look
    monkeypatch.setattr(check, "look", lambda *a: looked.append(a[1]) or real(*a))
    assert look_at_all(index, True, Cache(tmp_path / "c.json")) == expected and looked == []
    changed = data / "train/cat/train001.png"
    write_image(changed, seed=77)
    os.utime(changed, ns=(1, 1))
    assert look_at_all(index, True, Cache(tmp_path / "c.json")) != expected
    assert looked == ["train/cat/train001.png"]
    (tmp_path / "c.json").write_text("{damaged")
    look_at_all(index, True, Cache(tmp_path / "c.json"))
    assert len(looked) == 1 + len(expected)


def test_train_refuses_files_with_bad_headers(data: Path, refused: Refused, tmp_path: Path) -> None:
    """Before anything is written; a truncated file shows only with --check full."""
    spoil(data)
    said = refused(3, "train", data, *TINY, "-o", tmp_path / "run")
    assert said.count("\n") == 1 and "4 images cannot be used" in said and "--bad-images skip" in said
    assert "5 images cannot be used" in refused(3, "train", data, *TINY, "--check", "full", "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_skipped_images_are_listed_and_the_rest_is_trained_on(data: Path, tmp_path: Path, refused: Refused) -> None:
    spoil(data)
    options = [*TINY, "--epochs", "1", "--check", "full", "--bad-images", "skip", "-o", str(tmp_path / "run")]
    assert "more than --max-bad-share 0.01 of 26" in refused(3, "train", data, *options)
    assert main(["train", str(data), *options, "--max-bad-share", "0.5"]) == 0
    listed = [line.split("\t")[0] for line in (tmp_path / "run/bad_images.txt").read_text().splitlines()]
    manifest = (tmp_path / "run/data/manifest.csv").read_text()
    assert len(listed) == 5 and not [path for path in listed if path in manifest]
    assert len(manifest.splitlines()) == 1 + 21
