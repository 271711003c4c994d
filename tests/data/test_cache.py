"""Kept images are the decoded ones, bit for bit, whoever kept them, whatever happened to the files since."""

import copy
import errno
import gc
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from export.predict import Preprocessing
from resnet_dist.cli.main import main
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.cache import RECORD, START, ImageCache, bytes_needed, choose_tier, disk_file, shares
from resnet_dist.data.decode import Reader, load_image
from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.data.loader import DeviceImages, EvalImages, EvalLoader, Share, TrainBatches, TrainImages, TrainLoader
from resnet_dist.errors import DataError, MachineError
from resnet_dist.runtime import environment as launcher
from tests.conftest import TINY, make_folder, write_image
from tests.data.test_loader import assert_equal_batches
from tests.runtime.launch import together

SPEC = Preprocessing(img_size=16, resize=18)
ROOM = 1 << 20
AUGMENTATIONS = {
    "random-resized": AugmentConfig(),
    "trivial and mixing": AugmentConfig(aug="trivial", mixup=0.4, cutmix=1.0, erasing=0.5),
    "random-pad": AugmentConfig(crop="random-pad", crop_padding=0, color_jitter=0.4),
    "none": AugmentConfig(aug="none"),
}


@pytest.fixture
def table(tmp_path: Path) -> ImageTable:
    """Twelve images of several sizes, whose files a test may change."""
    files = [tmp_path / "images" / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        write_image(file, number, size=(20 + number, 31 - number))
    return ImageTable(tmp_path / "images", PathTable([file.name for file in files]), np.arange(12))


@pytest.fixture
def memory() -> Iterator[Path]:
    """The name of an empty file in memory."""
    number = os.memfd_create("test")
    yield Path(f"/proc/{os.getpid()}/fd/{number}")
    os.close(number)


class Refusing(Reader):
    """Knows which images there are, and fails a test that has one decoded."""

    def __call__(self, index: int) -> np.ndarray:
        raise AssertionError(f"image {index} was decoded")


def only_kept(reader: Reader, file: Path) -> ImageCache:
    """A cache, as another process would open it, that cannot decode."""
    return ImageCache(Refusing(reader.table, reader.spec, reader.least), file, ROOM)


def assert_right(cache: ImageCache) -> None:
    """Every image, against Pillow."""
    for index in range(len(cache.reader.table)):
        assert np.array_equal(cache(index), np.asarray(load_image(cache.reader.table, index)))


# ---------------------------------------------------------------------------------------------------------------------
# The same batches


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_training_batches_are_the_same_in_every_epoch(table: ImageTable, memory: Path, name: str, workers: int) -> None:
    """Three epochs; then everything is kept, by whichever process."""
    loaders = []
    for cached in (False, True):
        images = TrainImages(table, SPEC, AUGMENTATIONS[name], seed=3)
        if cached:
            images.read = ImageCache(images.reader, memory, ROOM)
        batches = TrainBatches(len(table), 3, Share(4), drop_last=False)
        loaders.append(TrainLoader(images, batches, workers if cached else 0, pin_memory=False))
    for epoch in range(3):
        assert_equal_batches(*(list(loader.epoch(epoch)) for loader in loaders))
    kept = only_kept(TrainImages(table, SPEC, AUGMENTATIONS[name], seed=3).reader, memory)
    assert sum(kept(index).size for index in range(12)) == int(kept._bytes[:8].view(np.int64)[0]) - kept._first


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_are_the_same(table: ImageTable, tmp_path: Path, workers: int) -> None:
    plain, cached = EvalImages(table, SPEC), EvalImages(table, SPEC)
    cached.read = ImageCache(cached.reader, tmp_path / "kept", ROOM)
    loader = EvalLoader(cached, 5, workers, pin_memory=False)
    for _ in range(2):
        assert_equal_batches([list(EvalLoader(plain, 5, 0, False))], [list(loader)])
    assert only_kept(plain.reader, tmp_path / "kept")(11).shape == (16, 16, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_on_a_device_make_the_same_batches(table: ImageTable, workers: int) -> None:
    """On the CPU as the device; where every epoch has the same pixels, which is what may be kept so."""
    images = TrainImages(table, SPEC, AUGMENTATIONS["none"], seed=3)
    assert [TrainImages(table, SPEC, cfg, 0).is_fixed for cfg in AUGMENTATIONS.values()] == [False, False, False, True]
    assert not TrainImages(table, SPEC, AugmentConfig(aug="none", mixup=0.2), 0).is_fixed
    batches = TrainBatches(len(table), 3, Share(4, accumulate=2), drop_last=False)
    loaders = [TrainLoader(images, batches, 0, pin_memory=False)]
    loaders += [TrainLoader(DeviceImages(images, torch.device("cpu"), workers), batches, workers, pin_memory=False)]
    for epoch, first_step in ((0, 0), (1, 0), (2, 1)):
        assert_equal_batches(*(list(loader.epoch(epoch, first_step)) for loader in loaders))
    plain = EvalImages(table, SPEC)
    kept = DeviceImages(plain, torch.device("cpu"), workers)
    assert_equal_batches([list(EvalLoader(plain, 5, 0, False))], [list(EvalLoader(kept, 5, workers, False))])


def fill(cache: ImageCache, order: list[int]) -> None:
    for index in order:
        cache(index)


def test_processes_can_fill_the_cache_at_the_same_time(table: ImageTable, memory: Path) -> None:
    """Four, in four orders, twice over; each image is kept in a place of its own."""
    reader = Reader(table, None)
    orders = [list(np.random.default_rng(seed).permutation(12)) * 2 for seed in range(4)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(ImageCache(reader, memory, ROOM), order)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    kept = only_kept(reader, memory)
    assert_right(kept)
    places = sorted((int(row["offset"]), int(row["height"]) * int(row["width"]) * 3) for row in kept._records)
    assert all(place + size <= after for (place, size), (after, _) in pairwise(places))


def test_pickled_copy_opens_the_same_file(table: ImageTable, tmp_path: Path) -> None:
    """As a process that is spawned, not forked, gets it."""
    cache = ImageCache(Reader(table, None), tmp_path / "kept", ROOM)
    copied = copy.copy(cache)
    cache(5)
    assert copied._fd != cache._fd
    assert copied._records[5] == cache._records[5]
    assert_right(copied)


# ---------------------------------------------------------------------------------------------------------------------
# Never stale, never wrong


def replace_pixels(file: Path) -> None:
    """Other pixels, in a file whose size and time of change are as before."""
    before = file.stat()
    Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    os.truncate(file, before.st_size) if file.stat().st_size > before.st_size else None
    with file.open("ab") as stream:
        stream.write(bytes(before.st_size - file.stat().st_size))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("change", [replace_pixels, lambda file: write_image(file, 99, size=(23, 28))])
def test_changed_file_is_decoded_again(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """In the cache that has kept it, and in one that opens the same file later; then that is kept."""
    file = tmp_path / "a.bmp"  # whose size depends on that of the image alone
    write_image(file, 1)
    table = ImageTable(tmp_path, PathTable(["a.bmp"]), np.zeros(1, np.int64))
    cache = ImageCache(Reader(table, None), tmp_path / "kept", ROOM)
    before = cache(0).copy()
    change(file)
    assert not np.array_equal(before, np.asarray(load_image(table, 0)))
    assert_right(ImageCache(Reader(table, None), tmp_path / "kept", ROOM))
    assert_right(cache)
    assert_right(only_kept(Reader(table, None), tmp_path / "kept"))


def test_missing_file_is_an_error_as_without_a_cache(table: ImageTable, tmp_path: Path) -> None:
    cache = ImageCache(Reader(table, None), tmp_path / "kept", ROOM)
    cache(3)
    (table.root / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png: cannot be opened"):
        cache(3)


@pytest.mark.parametrize("where", ["pixels", "record", "next", "end"])
def test_damaged_cache_gives_the_right_pixels(table: ImageTable, tmp_path: Path, where: str) -> None:
    """Whatever byte is wrong; and what is wrong is replaced."""
    reader, file = Reader(table, None), tmp_path / "kept"
    cache = ImageCache(reader, file, ROOM)
    fill(cache, list(range(12)))
    used = int(cache._bytes[:8].view(np.int64)[0])
    del cache
    draw = np.random.default_rng(4)
    for _ in range(20):
        low, high = {
            "pixels": (START + 12 * RECORD.itemsize, used),
            "record": (START, START + 12 * RECORD.itemsize),
            "next": (0, 8),
            "end": (used, used),
        }[where]
        if where == "end":
            os.truncate(file, used // 2)
        else:
            with file.open("r+b") as stream:
                stream.seek(int(draw.integers(low, high)))
                stream.write(draw.bytes(1))
        assert_right(ImageCache(reader, file, ROOM))


def test_cache_never_exceeds_its_room(table: ImageTable, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    cache = ImageCache(Reader(table, None), file, 5000)  # two of twelve
    assert_right(cache)
    assert_right(cache)
    assert np.count_nonzero(cache._records["height"]) in (2, 3)
    assert file.stat().st_size == START + 12 * RECORD.itemsize + 5000


def test_full_disk_only_stops_caching(table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def full(*arguments: object) -> int:
        tries.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = ImageCache(Reader(table, None), tmp_path / "kept", ROOM)
    monkeypatch.setattr(os, "pwrite", full)
    assert_right(cache)
    assert len(tries) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Where, and whether it fits


def test_cache_on_disk_is_reused_only_for_the_same_pixels(table: ImageTable, tmp_path: Path) -> None:
    reader = Reader(table, SPEC)
    fill(ImageCache(reader, disk_file(tmp_path / "kept", reader), ROOM), list(range(12)))
    again = Reader(ImageTable(table.root, PathTable(list(table.paths)), table.targets), Preprocessing(**vars(SPEC)))
    fill(only_kept(again, disk_file(tmp_path / "kept", again)), list(range(12)))
    fewer = ImageTable(table.root, PathTable(list(table.paths)[1:]), table.targets[1:])
    others = [Reader(fewer, SPEC), Reader(table, None), Reader(table, None, 8)]
    others += [Reader(table, Preprocessing(img_size=16, resize=18, interpolation="bicubic"))]
    others += [Reader(ImageTable(table.root / "..", table.paths, table.targets), SPEC)]
    names = {disk_file(tmp_path / "kept", one) for one in (reader, *others)}
    assert len(names) == 6


def test_bytes_needed_of_whole_images_are_those_of_their_pixels(table: ImageTable) -> None:
    """Exactly, where all headers are read."""
    pixels = sum((20 + number) * (31 - number) * 3 for number in range(12))
    assert bytes_needed(Reader(table, None)) == pixels + 12 * RECORD.itemsize
    assert bytes_needed(Reader(table, SPEC)) == 12 * (16 * 16 * 3 + RECORD.itemsize)
    assert shares([Reader(table, None), Reader(table, SPEC)], 0) == [0, 0]
    assert sum(shares([Reader(table, None), Reader(table, SPEC)], 10**6)) in (10**6 - 1, 10**6)


@pytest.mark.parametrize(
    ("asked", "free", "epochs", "expected"),
    [
        ("none", 1e9, 5, "none"),
        ("auto", 2.0, 5, "ram"),
        ("auto", 1.9, 5, "none"),
        ("auto", 1e9, 1, "none"),
        ("ram", 1.2, 5, "ram"),
        ("ram", 1.1, 5, None),
        ("ram", 1e9, 1, "ram"),
        ("device", 1.2, 5, "ram"),
        ("device", 1.1, 5, None),
        ("disk", 1.2, 1, "disk"),
        ("disk", 1.1, 5, None),
    ],
)
def test_tier_depends_on_free_memory(
    table: ImageTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    free: float,
    epochs: int,
    expected: str | None,
) -> None:
    """`free` in multiples of what is needed, of memory or of the disk."""
    readers = [Reader(table, None), Reader(table, SPEC)]
    needed = sum(map(bytes_needed, readers))
    monkeypatch.setattr(launcher, "available_memory", lambda: round(free * needed))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=round(free * needed)))
    if expected is None:
        with pytest.raises(MachineError, match=f"^--cache {asked}: about .* MiB, but there is .* use "):
            choose_tier(asked, readers, epochs, tmp_path / "kept")
        return
    tier = choose_tier(asked, readers, epochs, tmp_path / "kept")
    assert tier.name == expected
    assert tier.room <= free * needed
    assert tier.name == "none" or tier.room >= needed


@pytest.mark.parametrize(("asked", "expected"), [("auto", "none"), ("ram", None), ("device", None), ("disk", "disk")])
def test_without_memfd_only_disk_works(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, expected: str | None
) -> None:
    """As on systems other than Linux."""
    monkeypatch.delattr(os, "memfd_create")
    if expected is None:
        with pytest.raises(MachineError, match=f"--cache {asked}: needs Linux; use --cache disk"):
            choose_tier(asked, [Reader(table, SPEC)], 5, tmp_path)
    else:
        assert choose_tier(asked, [Reader(table, SPEC)], 5, tmp_path).name == expected


# ---------------------------------------------------------------------------------------------------------------------
# The program


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("few"), train=4, val=2)


def run(data: Path, out: Path, *options: str) -> list[str]:
    return ["train", str(data), *TINY, "-b", "4", "--epochs", "2", "-o", str(out), *options]


def open_files() -> Iterator[str]:
    """What this process has open."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            yield str(link.readlink())


def test_every_cache_gives_the_same_run(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint has the same bits, a line says where the images are, and nothing stays open in memory."""
    first: dict[str, torch.Tensor] = {}
    for cache in ("none", "ram", "disk", "disk"):
        folder = ["--cache-dir", str(tmp_path / "kept")] if cache == "disk" else []
        assert main(run(few, tmp_path / "run", "--overwrite", "--cache", cache, *folder)) == 0
        said = capsys.readouterr().out
        assert ("images are decoded in every epoch" if cache == "none" else "decoded images are kept in") in said
        weights = load_file(tmp_path / "run/checkpoints/best.safetensors")
        first = first or weights
        assert all(torch.equal(weights[name], values) for name, values in first.items()), cache
    assert len(list((tmp_path / "kept").iterdir())) == 2
    gc.collect()
    assert not [name for name in open_files() if "resnet-dist" in name]


def test_cache_that_does_not_fit_is_refused(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(launcher, "available_memory", lambda: 1000)
    said = refused(4, *run(few, tmp_path / "run", "--cache", "ram"))
    assert "--cache ram: about 0.0 MiB, but there is 0.0 MiB of free memory; use --cache disk or --cache none" in said


def test_cache_dir_must_be_a_folder_and_needs_cache_disk(
    few: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("")
    said = refused(4, *run(few, tmp_path / "run", "--cache", "disk", "--cache-dir", str(tmp_path / "file")))
    assert f"{tmp_path / 'file'}: cannot be created" in said
    said = refused(2, *run(few, tmp_path / "two", "--cache-dir", str(tmp_path)))
    assert "--cache-dir needs --cache disk, not auto" in said


@pytest.mark.matrix
def test_two_processes_share_the_cache(few: Path, tmp_path: Path) -> None:
    """The same bits as without a cache, with and without loader processes."""
    found = []
    for cache, workers in (("none", "0"), ("ram", "1"), ("disk", "0")):
        folder = ["--cache-dir", str(tmp_path / "kept")] if cache == "disk" else []
        options = [*run(few, tmp_path / cache, "--cache", cache, *folder), "--workers", workers]
        together(2, *options)
        found.append(load_file(tmp_path / cache / "checkpoints/best.safetensors"))
    for other in found[1:]:
        assert all(torch.equal(other[name], values) for name, values in found[0].items())
