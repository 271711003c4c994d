"""From a decoded image to the network's input: random geometry on uint8 on the host, the rest on the device.

Everything random about a sample is a pure function of (seed, epoch, sample). Loader processes, the number of training
processes and interruptions do not change it.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize_image

from export.predict import Preprocessing
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.exchange import Exchange
from resnet_dist.errors import DataError

_MASK = (1 << 64) - 1
IMAGENET = Preprocessing()


def sample_key(seed: int, epoch: int, index: int) -> int:
    """A 63-bit key of a sample in an epoch (splitmix64's finaliser over the three numbers; Steele et al. 2014)."""
    key = 0
    for part in (seed, epoch, index):
        key = (key ^ part) + 0x9E3779B97F4A7C15 & _MASK
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31
    return key >> 1


def sample_keys(seed: int, epochs: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The keys of many samples at once, int64 (n,) of int64 (n,) each: bit for bit those of `sample_key`."""
    key = np.zeros(len(positions), np.uint64)
    for part in (np.uint64(seed & _MASK), epochs.astype(np.uint64), positions.astype(np.uint64)):
        key = (key ^ part) + np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ key >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ key >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        key ^= key >> np.uint64(31)
    return (key >> np.uint64(1)).astype(np.int64)


def stream_seed(seed: int, stream: int) -> int:
    """The seed of order, augmentation and dropout: the run's seed in stream 0, another one in each later stream."""
    return sample_key(seed, -stream, -1) if stream else seed


def starts_fitted(cfg: AugmentConfig) -> bool:
    """Whether training images start from the evaluation geometry; otherwise they start from the whole image."""
    return cfg.aug == "none" or (cfg.aug != "custom" and cfg.crop == "random-pad")


class RandomResizedCrop(v2.RandomResizedCrop):  # type: ignore[misc]
    """torchvision's, with bit-equal results, without the time it spends on inspecting its input."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (3, H, W) in channels_last order to (3, size, size)."""
        box = self.make_params([image])
        top, left = box["top"], box["left"]
        # torch resizes this layout without copying; a crop with gaps between its rows does not have it.
        crop = image[:, top : top + box["height"], left : left + box["width"]].permute(1, 2, 0).contiguous()
        resized: torch.Tensor = resize_image(crop[None].permute(0, 3, 1, 2), self.size, self.interpolation)[0]
        return resized


def augment(cfg: AugmentConfig, spec: Preprocessing) -> v2.Transform | None:
    """The random geometry and colour of one training image, uint8 (3, H, W) to uint8 (3, img_size, img_size).

    None if training uses the evaluation geometry (`--aug none`) or a transform of the user (`--aug custom`).
    """
    if cfg.aug in ("none", "custom"):
        return None
    filter_ = v2.InterpolationMode(spec.interpolation)
    steps: list[v2.Transform] = []
    if cfg.crop == "random-resized":
        steps.append(RandomResizedCrop(spec.img_size, scale=cfg.crop_scale, interpolation=filter_))
    else:
        steps.append(v2.RandomCrop(spec.img_size, padding=cfg.crop_padding))
    if cfg.aug == "trivial":
        steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR, fill=list(spec.fill)))
    if cfg.aug == "randaug":
        steps.append(v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR, fill=list(spec.fill)))
    if cfg.color_jitter:
        steps.append(v2.ColorJitter(*[cfg.color_jitter] * 3))
    if cfg.rotation:
        steps.append(v2.RandomRotation(cfg.rotation, interpolation=v2.InterpolationMode.BILINEAR, fill=list(spec.fill)))
    if cfg.erasing:
        steps.append(v2.RandomErasing(cfg.erasing, value=list(spec.fill)))
    return steps[0] if len(steps) == 1 else v2.Compose(steps)


def training_pixels(
    pixels: np.ndarray, key: int, transform: v2.Transform | None, hflip: float
) -> tuple[np.ndarray, bool]:
    """The pixels of one training sample, uint8 (img_size, img_size, 3), and whether the device has to flip them.

    `pixels`, uint8 (H, W, 3), are in the evaluation geometry or whole (see `starts_fitted`). They are not changed.
    """
    if transform is None:
        return pixels, False
    torch.default_generator.manual_seed(key)
    flip = bool(torch.rand(()) < hflip)
    # No transform writes into its input, but torch accepts no read-only memory.
    writeable = pixels if pixels.flags.writeable else pixels.copy()
    changed = transform(torch.from_numpy(writeable).permute(2, 0, 1))
    return changed.permute(1, 2, 0).numpy(), flip


Transform = Callable[[torch.Tensor], torch.Tensor]  # uint8 (3, H, W) to uint8 (3, img_size, img_size)


def custom_pixels(pixels: np.ndarray, key: int, transform: Transform, size: int) -> np.ndarray:
    """The pixels of one training sample by a transform of the user: uint8 (size, size, 3).

    `pixels`, uint8 (H, W, 3), are the whole image; the transform gets a copy. Before each call the random numbers of
    torch, numpy and Python are seeded with `key`. Raises DataError if the transform returns something else than a uint8
    tensor (3, size, size).
    """
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    changed = transform(image)
    if not isinstance(changed, torch.Tensor):
        got = f"a {type(changed).__name__}"
    elif changed.dtype != torch.uint8 or changed.shape != (3, size, size):
        got = f"{str(changed.dtype).removeprefix('torch.')} of shape {tuple(changed.shape)}"
    else:
        return changed.permute(1, 2, 0).numpy(force=True)
    raise DataError(f"train_transform must return a uint8 tensor of shape (3, {size}, {size}), not {got}")


def mix_of_pair(key: int, cfg: AugmentConfig, size: int) -> tuple[float, int, int, int, int]:
    """How a pair of samples is mixed: the weight of the sample itself, and CutMix's box (left, top, right, bottom).

    MixUp (Zhang et al. 2018) has an empty box. CutMix (Yun et al. 2019) copies the box from the partner; its weight is
    the share of the area outside of the box. The weight is at least 0.5, so that a sample's own label weighs most.
    """
    draw = random.Random(key)
    use_cutmix = cfg.cutmix > 0 and (cfg.mixup == 0 or draw.random() < 0.5)
    alpha = cfg.cutmix if use_cutmix else cfg.mixup
    share = draw.betavariate(alpha, alpha)
    share = max(share, 1 - share)
    if not use_cutmix:
        return share, 0, 0, 0, 0
    side = math.floor(size * math.sqrt(1 - share))
    x, y = draw.random() * size, draw.random() * size
    x, y = round(x - side / 2), round(y - side / 2)
    left, right = max(x, 0), max(min(x + side, size), 0)
    top, bottom = max(y, 0), max(min(y + side, size), 0)
    return 1 - (right - left) * (bottom - top) / size**2, left, top, right, bottom


@dataclass
class Batch:
    """A batch of samples for the network.

    Attributes:
        images: uint8 (B, img_size, img_size, 3).
        targets: int64 (B,), class indices.
        index: int64 (B,), positions in the table of images.
        keys: int64 (B,), `sample_key` of each in training, 0 in evaluation.
        flip: bool (B,), which images the device has to mirror; None for none.
        mix: float32 (B, 5), rows of `mix_of_pair` (equal for both samples of a pair), or None.
        changes: float32 (B, 16), rows of `device_augment.Changes` for images that are on the device; `images` is empty.
        exchange: with images that are spread over the processes; `changes` are then those of `exchange.rows`.
    """

    images: torch.Tensor
    targets: torch.Tensor
    index: torch.Tensor
    keys: torch.Tensor
    flip: torch.Tensor | None = None
    mix: torch.Tensor | None = None
    changes: torch.Tensor | None = None
    exchange: Exchange | None = None

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory (the loader calls this)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, copied without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> "Iterator[Batch]":
        """The samples in batches of `size`, the last with the rest; they share the memory of this one."""
        fields = vars(self).values()
        parts = [repeat(t) if t is None or not len(t) else torch.split(t, size) for t in fields]
        return map(Batch, *parts)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values: dict[str, Any] = {n: change(t) if isinstance(t, torch.Tensor) else t for n, t in vars(self).items()}
        if self.exchange is not None:
            rows, order = change(self.exchange.rows), change(self.exchange.order)
            values["exchange"] = replace(self.exchange, rows=rows, order=order)
        return Batch(**values)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the batch."""
        fields = [*vars(self).values(), *(vars(self.exchange).values() if self.exchange else ())]
        return [value for value in fields if isinstance(value, torch.Tensor)]

    @property
    def partners(self) -> torch.Tensor:
        """int64 (B,), the target of the sample that each sample is mixed with."""
        return swap_pairs(self.targets)


def swap_pairs(values: torch.Tensor) -> torch.Tensor:
    """Exchange rows 2k and 2k + 1. The number of rows must be even."""
    return values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)


class ToInput:
    """On the device: uint8 batches to the float input of the network, flipped, normalised and mixed.

    `augment` makes the uint8 images of batches that only say how kept images change.
    """

    def __init__(
        self, spec: Preprocessing, device: torch.device, augment: Callable[[Batch], torch.Tensor] | None = None
    ) -> None:
        self.augment = augment
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (spec.mean, spec.std))
        # A tensor: CUDA would multiply with the reciprocal of a Python number, which gives other bits.
        self.largest = torch.tensor(255.0, device=device)
        self.rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, batch: Batch) -> torch.Tensor:
        """float32 (B, 3, S, S) of uint8 (B, S, S, 3), channels_last; bit-equal to `export.predict.normalise`."""
        images = batch.images if batch.changes is None or self.augment is None else self.augment(batch)
        if batch.flip is not None:
            images = mirrored(images, batch.flip)
        rows = images.flatten(2).to(torch.float32)
        mean, std = self._row(images.shape[2])
        values = rows.div_(self.largest).sub_(mean).div_(std).view(images.shape)
        if batch.mix is not None:
            values = _mix(values, batch.mix)
        return values.permute(0, 3, 1, 2)

    def _row(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std repeated for a row of `width` pixels: a CPU is four times as fast as with 3 values."""
        if width not in self.rows:
            self.rows[width] = (self.mean.repeat(width), self.std.repeat(width))
        return self.rows[width]


def mirrored(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """The images (B, S, S, 3), mirrored from left to right where `flip`, bool (B,), is set."""
    if images.device.type != "cpu":  # reading `flip` on the host would wait for the device
        return torch.where(flip[:, None, None, None], images.flip(2), images)
    images = images.clone()
    for row in flip.nonzero()[:, 0].tolist():
        images[row] = images[row].flip(1)
    return images


def _mix(values: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """MixUp or CutMix of neighbouring pairs; float32 (B, S, S, 3) and (B, 5)."""
    share, left, top, right, bottom = (column[:, None, None, None] for column in mix.unbind(1))
    place = torch.arange(values.shape[1], device=values.device)
    y, x = place[None, :, None, None], place[None, None, :, None]
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    is_cutmix = right > left
    weight = torch.where(is_cutmix, (~inside).to(values.dtype), share)
    return weight * values + (1 - weight) * swap_pairs(values)
