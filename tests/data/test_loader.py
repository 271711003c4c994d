"""Which samples come in which order on which process, and that helpers, interruptions and damage change nothing."""

import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.predict import Preprocessing, decode, fit
from resnet_dist.config.schema import AugmentConfig, DataConfig
from resnet_dist.data import loader as loader_module
from resnet_dist.data.decode import load_image
from resnet_dist.data.index import ImageTable, PathTable, read_index
from resnet_dist.data.loader import (
    EvalImages,
    EvalLoader,
    Key,
    KnownSamples,
    Share,
    TrainBatches,
    TrainImages,
    TrainLoader,
    default_workers,
    epoch_order,
)
from resnet_dist.data.transforms import Batch, mix_of_pair, sample_key
from resnet_dist.errors import DataError, UsageError
from tests.conftest import write_image

SPEC = Preprocessing(img_size=16, resize=18)
RANDOM = AugmentConfig(aug="trivial", mixup=0.4, cutmix=1.0, erasing=0.5)


@pytest.fixture(scope="module")
def table(folder: Path) -> ImageTable:
    """Twenty-four training images."""
    return read_index(DataConfig(data=str(folder))).train


def few(table: ImageTable, count: int) -> ImageTable:
    return ImageTable(table.root, PathTable(list(table.paths)[:count]), table.targets[:count])


def train_loader(
    table: ImageTable, share: Share, workers: int = 0, cfg: AugmentConfig = RANDOM, spec: Preprocessing = SPEC
) -> TrainLoader:
    batches = TrainBatches(len(table), seed=3, share=share, drop_last=False)
    return TrainLoader(TrainImages(table, spec, cfg, seed=3), batches, workers, pin_memory=False)


def positions(batches: Iterable[Batch]) -> list[int]:
    return [index for batch in batches for index in batch.index.tolist()]


def assert_equal_batches(one: list[list[Batch]], two: list[list[Batch]]) -> None:
    """Every field of every batch, bit by bit."""
    assert [len(step) for step in one] == [len(step) for step in two]
    for first, second in zip(chain(*one), chain(*two), strict=True):
        for name, value in vars(first).items():
            other = getattr(second, name)
            assert value is other is None or torch.equal(value, other), name


# ---------------------------------------------------------------------------------------------------------------------
# Order


@pytest.mark.parametrize(("samples", "global_batch"), [(24, 6), (25, 6), (29, 6), (5, 6), (5, 12), (1, 4), (100, 1)])
def test_epoch_is_a_permutation_padded_from_its_start_or_truncated(samples: int, global_batch: int) -> None:
    filled = epoch_order(samples, 0, 0, global_batch, drop_last=False)
    assert len(filled) == global_batch * ((samples + global_batch - 1) // global_batch)
    assert sorted(filled[:samples].tolist()) == list(range(samples))
    assert all(filled[i] == filled[i % samples] for i in range(len(filled)))
    cut = epoch_order(samples, 0, 0, global_batch, drop_last=True)
    assert np.array_equal(cut, filled[: samples // global_batch * global_batch])
    assert filled.dtype == cut.dtype == np.int64


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    """Not on torch's generator; and all twenty differ, in the first ten places too."""
    torch.manual_seed(1)
    orders = {(seed, epoch): epoch_order(1000, seed, epoch, 7, False) for seed in range(4) for epoch in range(5)}
    torch.manual_seed(2)
    for (seed, epoch), order in orders.items():
        assert np.array_equal(order, epoch_order(1000, seed, epoch, 7, False))
        assert np.array_equal(order[:1000], epoch_order(1000, seed, epoch, 50, True))
    assert len({tuple(order[:10].tolist()) for order in orders.values()}) == 20


SHARES = [(12, 1, 1), (6, 1, 2), (6, 2, 1), (3, 2, 2), (3, 1, 4), (3, 4, 1), (4, 1, 3), (4, 3, 1), (2, 3, 2), (1, 4, 3)]


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), SHARES)
@pytest.mark.parametrize(("samples", "drop_last"), [(50, False), (50, True), (7, False)])
def test_global_batch_does_not_depend_on_processes_and_accumulation(
    samples: int, drop_last: bool, batch_size: int, accumulate: int, world: int
) -> None:
    """The blocks are in the order of the epoch: micro-step by micro-step, and within each process by process."""
    ranks = [
        list(TrainBatches(samples, 5, Share(batch_size, accumulate, world, rank), drop_last)) for rank in range(world)
    ]
    assert {len(batches) for batches in ranks} == {len(ranks[0])}
    seen = [index for micro_step in zip(*ranks, strict=True) for batch in micro_step for _, index in batch]
    assert seen == epoch_order(samples, 5, 0, 12, drop_last).tolist()


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("first_step", range(7))
def test_an_epoch_can_begin_at_any_step(first_step: int, batch_size: int, accumulate: int, world: int) -> None:
    """And then gives the rest of the sequence; after the last step, nothing."""
    batches = TrainBatches(24, 0, Share(batch_size, accumulate, world, rank=world - 1), drop_last=False)
    batches.epoch, batches.until = 2, 3
    whole = list(batches)
    assert {epoch for batch in whole for epoch, _ in batch} == {2}
    assert (len(whole), batches.steps_per_epoch) == (6 * accumulate, 6)
    batches.first_step = first_step
    assert np.array_equal(list(batches), whole[first_step * accumulate :])
    assert len(batches) == len(list(batches))


# ---------------------------------------------------------------------------------------------------------------------
# Training batches


def test_batches_hold_the_samples_of_their_index(table: ImageTable) -> None:
    """Without augmentation: the images, targets and keys of the samples that the order names."""
    steps = list(train_loader(table, Share(5, accumulate=2), cfg=AugmentConfig(aug="none")).epoch(1))
    assert [len(step) for step in steps] == [2, 2, 2]
    order = epoch_order(24, 3, 1, 10, False)
    assert positions(chain(*steps)) == order.tolist()
    for batch in chain(*steps):
        for image, target, index, key in zip(batch.images, batch.targets, batch.index, batch.keys, strict=True):
            path = table.root / table.paths[int(index)]
            assert np.array_equal(image.numpy(), fit(decode(path), SPEC))
            assert path.parent.name == ("cat", "dog", "emu")[int(target)]
            assert int(key) == sample_key(3, 1, int(index))


def test_workers_do_not_change_batches(table: ImageTable) -> None:
    """Two epochs in full, one from its middle, and one after an epoch that was left half way."""
    loaders = [train_loader(table, Share(4, accumulate=2), workers) for workers in (0, 2)]
    for epoch, first_step in ((0, 0), (1, 0), (1, 2)):
        assert_equal_batches(*(list(loader.epoch(epoch, first_step)) for loader in loaders))
    for loader in loaders:
        next(loader.epoch(4))
    assert_equal_batches(*(list(loader.epoch(5)) for loader in loaders))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_stream_over_epochs_gives_the_same_batches(
    table: ImageTable, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun once for three epochs and from the middle of one; begun again after a jump or beyond its end."""
    begun = []
    checked = loader_module._checked
    monkeypatch.setattr(loader_module, "_checked", lambda loader: begun.append(loader) or checked(loader))
    plain, stream = (train_loader(table, Share(4, accumulate=2), n) for n in (0, workers))
    expected = {epoch: list(plain.epoch(epoch)) for epoch in range(6)}
    begun.clear()
    for epoch, first_step in ((1, 1), (2, 0), (3, 0)):
        assert_equal_batches(list(stream.epoch(epoch, first_step, until=4)), expected[epoch][first_step:])
    assert len(begun) == 1
    for epoch, first_step, until in ((4, 0, 6), (0, 0, 6), (1, 0, 6)):
        assert_equal_batches(list(stream.epoch(epoch, first_step, until)), expected[epoch])
    assert len(begun) == 3, "beyond its end, and after the jump back"
    next(stream.epoch(2, 0, until=6))
    assert_equal_batches(list(stream.epoch(2, 1, until=6)), expected[2][1:])
    assert_equal_batches(list(stream.epoch(5, 0, until=6)), expected[5])
    assert len(begun) == 4


def test_loader_processes_go_on_while_the_next_epoch_is_awaited(table: ImageTable, tmp_path: Path) -> None:
    """After the last batch of an epoch, the first batches of the next epoch are loaded without a request."""

    class Noting(TrainImages):
        def __getitems__(self, keys: Sequence[Key]) -> Batch | DataError:
            (tmp_path / f"{keys[0][0]}-{keys[0][1]}").touch()
            return super().__getitems__(keys)

    batches = TrainBatches(len(table), 3, Share(4), drop_last=False)
    stream = TrainLoader(Noting(table, SPEC, AugmentConfig(), 3), batches, 2, pin_memory=False)
    list(stream.epoch(0, until=2))
    for _ in range(500):
        if len(list(tmp_path.glob("1-*"))) >= 2:
            break
        time.sleep(0.01)
    assert 2 <= len(list(tmp_path.glob("1-*"))) <= 4, "two batches for each process, no more"
    assert len(list(stream.epoch(1, until=2))) == stream.steps_per_epoch


def test_samples_do_not_depend_on_batch_or_earlier_samples(table: ImageTable) -> None:
    """A resumed epoch gives bit for bit what the whole one gave, and other shares the same samples."""
    share = Share(4, accumulate=1)
    whole = list(train_loader(table, share).epoch(6))
    torch.manual_seed(77)
    assert_equal_batches(list(train_loader(table, share).epoch(6, first_step=4)), whole[4:])
    halves = [list(train_loader(table, Share(2, 1, 2, rank)).epoch(6)) for rank in range(2)]
    for step, (batch,) in enumerate(whole):
        for name in ("images", "targets", "index", "keys", "mix"):
            parts = torch.cat([getattr(half[step][0], name) for half in halves])
            assert torch.equal(parts, getattr(batch, name)), name


def test_both_samples_of_a_pair_have_the_same_mix(table: ImageTable) -> None:
    """Neighbours of the order of the epoch, by the key of the first; and the pairs differ."""
    for batch in chain(*train_loader(table, Share(4, 3)).epoch(2)):
        assert batch.mix is not None
        expected = [mix_of_pair(int(key), RANDOM, 16) for key in batch.keys[::2] for _ in range(2)]
        assert torch.equal(batch.mix, torch.tensor(expected, dtype=torch.float32))
        assert not torch.equal(batch.mix[0], batch.mix[2])


@pytest.mark.parametrize("share", [Share(4), Share(2, accumulate=2, world=3, rank=1), Share(25)])
@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_samples_without_pixels_are_those_of_the_order(
    table: ImageTable, share: Share, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the features (view after view), targets and keys, however many batches are looked up together."""
    monkeypatch.setattr(loader_module, "AT_ONCE", at_once)
    batches = TrainBatches(len(table), 3, share, drop_last=False)
    loader = TrainLoader(KnownSamples(table, 3, views=2), batches, 0, pin_memory=False)
    for epoch, first_step, until in ((0, 0, 3), (1, 0, 3), (2, 0, 3), (2, batches.steps_per_epoch - 1, 9), (3, 0, 9)):
        steps = list(loader.epoch(epoch, first_step, until))
        order = epoch_order(24, 3, epoch, share.global_batch, False)
        blocks = order.reshape(-1, share.accumulate, share.world, share.batch_size)[first_step:, :, share.rank]
        sizes = [[len(batch.targets) for batch in step] for step in steps]
        assert sizes == [[share.batch_size] * share.accumulate] * len(blocks)
        seen = [torch.cat([getattr(b, name) for b in chain(*steps)]) for name in ("index", "targets", "keys")]
        expected = blocks.ravel().tolist()
        assert seen[0].tolist() == [epoch % 2 * 24 + position for position in expected]
        assert seen[1].tolist() == [int(table.targets[position]) for position in expected]
        assert seen[2].tolist() == [sample_key(3, epoch, position) for position in expected]


def test_no_flip_and_no_mix_without_their_options(table: ImageTable) -> None:
    (batch,) = next(train_loader(table, Share(24), cfg=AugmentConfig(hflip=0.0)).epoch(0))
    assert batch.flip is None
    assert batch.mix is None


def test_drop_last_without_a_full_batch_is_refused(table: ImageTable) -> None:
    batches = TrainBatches(len(table), 0, Share(25), drop_last=True)
    with pytest.raises(UsageError, match="24 training images do not fill one global batch of 25"):
        TrainLoader(TrainImages(table, SPEC, RANDOM, 0), batches, workers=0, pin_memory=False)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("samples", range(1, 10))
def test_every_sample_is_evaluated_once(table: ImageTable, samples: int, world: int, batch_size: int) -> None:
    """Over all processes, of which some may have none."""
    images = EvalImages(few(table, samples), SPEC)
    loaders = [EvalLoader(images, batch_size, 0, False, world, rank) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {loader.rounds for loader in loaders} == {max(len(own) for own in batches)}
    assert max(len(batch.images) for own in batches for batch in own) <= batch_size
    assert max(sum(len(batch.images) for batch in own) for own in batches) <= loaders[0].per_process
    assert sorted(positions(chain(*batches))) == list(range(samples))
    known = KnownSamples(images.table)
    for rank, own in enumerate(batches):
        looked_up = list(EvalLoader(known, batch_size, 0, False, world, rank))
        for name in ("index", "targets", "keys"):
            assert [getattr(b, name).tolist() for b in looked_up] == [getattr(b, name).tolist() for b in own]


def test_evaluation_batches_have_the_evaluation_geometry(table: ImageTable) -> None:
    """Twice over, with as many helpers as you like."""
    expected = np.stack([fit(load_image(table, index), SPEC) for index in range(24)])
    for workers in (0, 2):
        loader = EvalLoader(EvalImages(table, SPEC), 7, workers, pin_memory=False)
        for _ in range(2):
            batches = list(loader)
            assert np.array_equal(torch.cat([batch.images for batch in batches]).numpy(), expected)
            assert np.array_equal(torch.cat([batch.targets for batch in batches]).numpy(), table.targets)
            assert {(batch.flip, batch.mix, int(batch.keys.sum())) for batch in batches} == {(None, None, 0)}


# ---------------------------------------------------------------------------------------------------------------------
# Files that cannot be used


def spoiled_table(root: Path, kind: str) -> tuple[ImageTable, Path]:
    """Eight sound images and one that is not."""
    files = [root / f"{i}.png" for i in range(9)]
    for seed, file in enumerate(files):
        write_image(file, seed)
    bad = files[4]
    data = bad.read_bytes()
    bad.unlink()
    if kind == "truncated":
        bad.write_bytes(data[: len(data) // 2])
    elif kind == "dangling link":
        bad.symlink_to("nowhere.png")
    elif kind == "folder":
        bad.mkdir()
    elif kind == "very narrow":
        Image.new("RGB", (1, 200_000)).save(bad)
    return ImageTable(root, PathTable([file.name for file in files]), np.zeros(9, np.int64)), bad


def error_of(loader: str, table: ImageTable, workers: int = 0, cfg: AugmentConfig = RANDOM) -> str:
    """The DataError that reading everything raises."""
    spec = Preprocessing(img_size=16, resize=20)
    try:
        if loader == "eval":
            list(EvalLoader(EvalImages(table, spec), 3, workers, pin_memory=False))
        else:
            list(train_loader(table, Share(4), workers, cfg, spec).epoch(0))
    except DataError as error:
        return str(error)
    pytest.fail("the damaged file was not noticed")


@pytest.mark.parametrize("kind", ["truncated", "missing", "dangling link", "folder"])
@pytest.mark.parametrize("loader", ["train", "eval"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_file_is_named_in_one_line(tmp_path: Path, kind: str, loader: str, workers: int) -> None:
    """Without the traceback that an exception in a loader process would bring along."""
    table, bad = spoiled_table(tmp_path, kind)
    said = error_of(loader, table, workers)
    assert said.startswith(f"{bad}: ")
    assert "Traceback" not in said
    assert "\n" not in said


@pytest.mark.parametrize("loader", ["train", "eval"])
def test_loader_processes_end_after_an_error(tmp_path: Path, loader: str) -> None:
    """At once: left to the collection of reference cycles, each would be waited for in vain, five seconds long."""
    before = multiprocessing.active_children()
    error_of(loader, spoiled_table(tmp_path, "truncated")[0], workers=2)
    assert set(multiprocessing.active_children()) <= set(before)


@pytest.mark.parametrize(
    ("loader", "cfg"),
    [("eval", RANDOM), ("train", AugmentConfig(aug="none")), ("train", AugmentConfig(crop="random-pad"))],
    ids=["evaluation", "training, aug none", "training, random-pad"],
)
def test_image_too_narrow_for_the_evaluation_geometry_is_named(tmp_path: Path, loader: str, cfg: AugmentConfig) -> None:
    table, bad = spoiled_table(tmp_path, "very narrow")
    said = error_of(loader, table, cfg=cfg)
    assert said.startswith(f"{bad}: ")
    assert "too narrow" in said


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"),
    [
        ("cpu", 2, 1, 0),
        ("cpu", 7, 1, 0),
        ("cpu", 8, 1, 2),
        ("cpu", 64, 1, 2),
        ("cpu", 16, 4, 0),
        ("cuda", 1, 1, 1),
        ("cuda", 16, 1, 16),
        ("cuda", 16, 8, 2),
        ("cuda", 4, 8, 1),
        ("cuda", 256, 4, 16),
    ],
)
def test_default_workers(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, processes: int, workers: int
) -> None:
    """None on a small CPU, the share of the cores on a GPU, never more than sixteen."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert default_workers(torch.device(device), processes) == workers
