"""The batches of one process: their samples, their order and their loader processes."""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from export.predict import Preprocessing
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.decode import Reader
from resnet_dist.data.index import ImageTable
from resnet_dist.data.transforms import (
    Batch,
    Transform,
    augment,
    custom_pixels,
    mix_of_pair,
    sample_key,
    sample_keys,
    starts_fitted,
    training_pixels,
)
from resnet_dist.errors import DataError, UsageError
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.faults import lost_loader
from resnet_dist.runtime.signals import shield_loader

Read = Callable[[int], np.ndarray]  # the decoded image at a position, uint8 (H, W, 3)
_loaders: "weakref.WeakSet[DataLoader[Batch]]" = weakref.WeakSet()  # all loaders, for `close_loaders`
Key = tuple[int, int]  # (epoch, position in the table)
AT_ONCE = 64  # batches of samples without pixels that are looked up together
Keys = np.ndarray | Sequence[Key]  # those of a batch: the sampler sends int64 (n, 2) to the loader processes


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one process takes.

    A global batch is one optimizer step. It consists of `world * accumulate` blocks of `batch_size` samples. Process
    `rank` takes block `m * world + rank` in micro-step `m`. So the samples of a step depend only on the global batch
    size, not on the numbers of processes and micro-steps.
    """

    batch_size: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0

    @property
    def global_batch(self) -> int:
        """Samples in an optimizer step, all processes and micro-steps together."""
        return self.batch_size * self.accumulate * self.world


def epoch_order(samples: int, seed: int, epoch: int, global_batch: int, drop_last: bool) -> np.ndarray:
    """The order of an epoch's samples, int64, in whole global batches. It depends only on the arguments.

    Each sample comes once. Then the last batch is filled from the start of the order or, with `drop_last`, dropped.
    """
    generator = torch.Generator().manual_seed(sample_key(seed, epoch, -1))
    order = torch.randperm(samples, generator=generator).numpy()
    steps = samples // global_batch if drop_last else -(-samples // global_batch)
    return np.resize(order, steps * global_batch)


class TrainBatches(Sampler[np.ndarray]):
    """The batches of one process in the epochs from `epoch` to below `until`, starting at any optimizer step.

    A batch is int64 (batch_size, 2), the epoch and the position in the table of each sample. With `of_all` it is that
    of all processes, process after process: (world * batch_size, 2).
    """

    def __init__(self, samples: int, seed: int, share: Share, drop_last: bool, of_all: bool = False) -> None:
        self.samples, self.seed, self.share, self.drop_last, self.of_all = samples, seed, share, drop_last, of_all
        self.epoch, self.first_step, self.until = 0, 0, 1

    def of_all_processes(self) -> "TrainBatches":
        """The same order, each batch with those of all processes."""
        return TrainBatches(self.samples, self.seed, self.share, self.drop_last, of_all=True)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        size = self.share.global_batch
        return self.samples // size if self.drop_last else -(-self.samples // size)

    def __iter__(self) -> Iterator[np.ndarray]:
        epochs, first_steps = range(self.epoch, self.until), chain([self.first_step], repeat(0))
        return chain.from_iterable(map(self._of_epoch, epochs, first_steps))  # one epoch's order at a time

    def _of_epoch(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        share = self.share
        order = epoch_order(self.samples, self.seed, epoch, share.global_batch, self.drop_last)
        blocks = order.reshape(-1, share.accumulate, share.world, share.batch_size)[first_step:]
        blocks = blocks if self.of_all else blocks[:, :, share.rank]
        size = share.batch_size * (share.world if self.of_all else 1)
        return iter(np.stack([np.full_like(blocks, epoch), blocks], -1).reshape(-1, size, 2))

    def __len__(self) -> int:
        return ((self.until - self.epoch) * self.steps_per_epoch - self.first_step) * self.share.accumulate


class Samples(Protocol):
    """A source of batches: the samples of a table, a whole batch at a time."""

    table: ImageTable

    def __getitems__(self, keys: Any) -> Batch | DataError:
        """The batch of these keys, or the error that prevents it."""


class TrainImages(Dataset[Batch]):
    """Training samples by (epoch, position), a whole batch at a time."""

    def __init__(
        self, table: ImageTable, spec: Preprocessing, cfg: AugmentConfig, seed: int, custom: Transform | None = None
    ) -> None:
        """`custom` replaces the random geometry and colours that `cfg` describes."""
        self.table, self.spec, self.cfg, self.seed, self.custom = table, spec, cfg, seed, custom
        self.transform = augment(cfg, spec)
        least = 2 * spec.img_size if cfg.scaled_decode else 0
        self.reader = Reader(table, spec) if starts_fitted(cfg) else Reader(table, None, least)
        self.read: Read = self.reader  # may be replaced by a cache

    @property
    def is_fixed(self) -> bool:
        """Whether a sample is the same in every epoch."""
        return self.cfg.aug == "none" and not (self.cfg.mixup or self.cfg.cutmix)

    def __getitems__(self, keys: Keys) -> Batch | DataError:
        """The batch, or the error as a value: if it were raised, the loader would wrap it in a traceback."""
        try:
            return self._batch(np.asarray(keys).tolist())
        except DataError as error:
            return error

    def _batch(self, keys: Sequence[Key]) -> Batch:
        size = self.spec.img_size
        images = np.empty((len(keys), size, size, 3), np.uint8)
        flips = []
        sample_keys = [sample_key(self.seed, epoch, index) for epoch, index in keys]
        for row, (_, index) in enumerate(keys):
            pixels = self.read(index)
            if self.custom is not None:
                images[row], flip = custom_pixels(pixels, sample_keys[row], self.custom, size), False
            else:
                images[row], flip = training_pixels(pixels, sample_keys[row], self.transform, self.cfg.hflip)
            flips.append(flip)
        batch = _batch_of(self.table, images, [index for _, index in keys], sample_keys)
        batch.flip = torch.tensor(flips) if any(flips) else None
        batch.mix = mix_of_batch(sample_keys, self.cfg, size)
        return batch


def mix_of_batch(sample_keys: Sequence[int], cfg: AugmentConfig, size: int) -> torch.Tensor | None:
    """How the pairs of a batch are mixed, float32 (B, 5); None without MixUp and CutMix. See `mix_of_pair`."""
    if not (cfg.mixup or cfg.cutmix):
        return None
    rows = [mix_of_pair(sample_keys[row - row % 2], cfg, size) for row in range(len(sample_keys))]
    return torch.tensor(rows, dtype=torch.float32)


class EvalImages(Dataset[Batch]):
    """Samples by position in the evaluation geometry, a whole batch at a time."""

    def __init__(self, table: ImageTable, spec: Preprocessing) -> None:
        self.table, self.spec = table, spec
        self.reader = Reader(table, spec)
        self.read: Read = self.reader  # may be replaced by a cache

    def __getitems__(self, positions: np.ndarray | Sequence[int]) -> Batch | DataError:
        """The batch, or the error that prevents it (see TrainImages)."""
        try:
            images = np.stack([self.read(index) for index in np.asarray(positions).tolist()])
        except DataError as error:
            return error
        return _batch_of(self.table, images, positions, [0] * len(positions))


def _batch_of(
    table: ImageTable, images: np.ndarray, positions: np.ndarray | Sequence[int], keys: Sequence[int]
) -> Batch:
    index = torch.from_numpy(np.array(positions, np.int64))
    targets = torch.from_numpy(table.targets)[index]
    return Batch(torch.from_numpy(images), targets, index, torch.tensor(keys, dtype=torch.int64))


def unpacked(keys: Keys | Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The epochs, positions and sample keys of a batch, int64 (n,) each.

    In evaluation the keys are only positions; epochs and sample keys are then 0. All samples are unpacked at once,
    because this is most of the work of a batch if nothing is decoded.
    """
    numbers = np.asarray(keys, np.int64)
    if numbers.ndim == 1:
        zeros = np.zeros_like(numbers)
        return zeros, numbers, zeros
    epochs, positions = numbers.T
    return epochs, positions, sample_keys(seed, epochs, positions)


class KnownSamples(Dataset[Batch]):
    """The samples of a table without pixels, for training and validation from cached features."""

    def __init__(self, table: ImageTable, seed: int = 0, views: int = 1) -> None:
        self.table, self.seed, self.views = table, seed, views
        self._none = torch.empty(0, dtype=torch.uint8)

    def __getitems__(self, keys: Keys | Sequence[int]) -> Batch:
        """The batch of these keys: (epoch, position) in training, position in evaluation. `index` is the row of the
        features.
        """
        epochs, positions, sample_keys = unpacked(keys, self.seed)
        rows = epochs % self.views * len(self.table) + positions
        targets, index, hashed = map(torch.from_numpy, (self.table.targets[positions], rows, sample_keys))
        return Batch(self._none, targets, index, hashed)


class DeviceImages(Dataset[Batch]):
    """Samples that are the same in every epoch, decoded once and cached on a device.

    `pixels`: uint8 (n, img_size, img_size, 3), in the order of the table. Later changes of a file have no effect.
    """

    def __init__(self, images: TrainImages | EvalImages, device: torch.device, workers: int) -> None:
        self.table, self.seed = images.table, images.seed if isinstance(images, TrainImages) else 0
        self.pixels = torch.empty(len(self.table), *[images.spec.img_size] * 2, 3, dtype=torch.uint8, device=device)
        for batch in EvalLoader(EvalImages(images.table, images.spec), 32, workers, pin_memory=False):
            self.pixels[batch.index.to(device)] = batch.images.to(device)

    def __getitems__(self, keys: Keys | Sequence[int]) -> Batch:
        """The batch, with its images on the device. Keys: (epoch, position) in training, positions in evaluation."""
        _, positions, sample_keys = unpacked(keys, self.seed)
        index = torch.from_numpy(positions.copy())
        pixels = self.pixels[index.to(self.pixels.device, non_blocking=True)]
        return Batch(pixels, torch.from_numpy(self.table.targets[positions]), index, torch.from_numpy(sample_keys))


class TrainLoader:
    """The training batches of this process, an optimizer step at a time.

    The loader processes read one stream of batches over many epochs: while the last batches of an epoch are trained on
    and validation runs, they load those of the next epoch. A batch depends only on its keys, so nothing else changes.
    """

    def __init__(self, samples: Samples, batches: TrainBatches, workers: int, pin_memory: bool) -> None:
        if batches.steps_per_epoch == 0:
            raise UsageError(
                f"--drop-last leaves no batch: {batches.samples} training images do not fill one global batch "
                f"of {batches.share.global_batch}"
            )
        self.batches, self.samples = batches, samples
        self._loader = _loader(samples, workers, pin_memory, batches)
        self._arriving: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None  # the epoch and step that arrive next
        self._until = 0  # the epoch before which the stream ends

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.batches.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0, until: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of an epoch, starting at `first_step`. Raises DataError.

        The loader processes continue with the next epochs below `until` (default: they stop after this epoch).
        """
        if self._next != (epoch, first_step) or epoch >= self._until:
            self._until = max(epoch + 1, until)
            self.batches.epoch, self.batches.first_step, self.batches.until = epoch, first_step, self._until
            self._arriving = _checked(self._loader)
        for step in range(first_step, self.steps_per_epoch):
            self._next = None  # an error ends the stream
            batches = list(islice(self._arriving, self.batches.share.accumulate))
            self._next = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield batches


class EvalLoader:
    """The evaluation batches of this process: a contiguous part of the table (it may be empty), each sample once."""

    def __init__(
        self, samples: Samples, batch_size: int, workers: int, pin_memory: bool, world: int = 1, rank: int = 0
    ) -> None:
        self.samples = len(samples.table)
        self.per_process = -(-self.samples // world)
        self.rounds = -(-self.per_process // batch_size)  # batches of the process with the most
        positions = np.arange(self.samples)[rank * self.per_process : (rank + 1) * self.per_process]
        batches = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
        self._loader = _loader(samples, min(workers, len(batches)), pin_memory, batches)

    def __iter__(self) -> Iterator[Batch]:
        return _checked(self._loader)


class LoadedHere:
    """Batches that this process loads itself, when they are asked for: the loader without loader processes.

    With `at_once`, so many batches are looked up together and then split, which takes less time.
    """

    def __init__(self, samples: Samples, batches: Iterable[np.ndarray], pin_memory: bool, at_once: int) -> None:
        self.samples, self.batches, self.at_once = samples, batches, at_once
        self.pin_memory = pin_memory and torch.cuda.is_available()

    def __iter__(self) -> Iterator[Batch | DataError]:
        keys = iter(self.batches)
        while some := list(islice(keys, self.at_once)):
            loaded = self.samples.__getitems__(np.concatenate(some))
            if isinstance(loaded, DataError):
                yield loaded
            else:
                batch = loaded.pin_memory() if self.pin_memory else loaded
                yield from batch.split(len(some[0])) if len(some) > 1 else [batch]


def _loader(samples: Samples, workers: int, pin_memory: bool, batches: Any) -> Iterable[Batch | DataError]:
    if isinstance(samples, KnownSamples):
        return LoadedHere(samples, batches, pin_memory, at_once=AT_ONCE)
    if isinstance(samples, DeviceImages):  # device memory cannot be pinned
        return LoadedHere(samples, batches, pin_memory=False, at_once=1)
    if workers == 0:
        return LoadedHere(samples, batches, pin_memory, at_once=1)
    loader: DataLoader[Batch] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        persistent_workers=True,
        worker_init_fn=shield_loader,
        # A forked process ignores signals from its start, which a spawned one cannot, and shares the index.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    _loaders.add(loader)
    return loader


def close_loaders() -> None:
    """End all loader processes of this process.

    They ignore the signal with which Python ends such processes at exit, so Python would wait for them forever.
    """
    for loader in list(_loaders):
        batches = getattr(loader, "_iterator", None)
        if batches is not None:
            batches._shutdown_workers()
            loader._iterator = None


def _unchanged(batch: Any) -> Any:
    return batch


def _checked(loader: Iterable[Batch | DataError]) -> Iterator[Batch]:
    with warnings.catch_warnings():  # Python 3.12 warns of forks of processes with threads; ours only wait
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            raise lost_loader(error) or error from None
        if isinstance(batch, DataError):
            try:
                raise batch
            finally:
                del batch  # otherwise the error keeps the loader alive, whose processes do not end
        yield batch


def default_workers(device: torch.device, processes_here: int) -> int:
    """Loader processes per training process if --workers is not given.

    With GPUs: the cores divided by the processes of this machine, at most 16. On a CPU the network itself needs the
    cores (decoding is a few percent of its time): none below 8 cores per process, otherwise 2.
    """
    share = max(1, launcher.cores() // processes_here)
    if device.type == "cpu":
        return 0 if share < 8 else 2
    return min(share, 16)
