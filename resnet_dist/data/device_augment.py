"""Augmentation on the device: decoded images stay in its memory, and a whole batch is changed at once.

What happens to an image is drawn on the host, by the transforms of the host and from the same key: the crop, the flip,
the colours, the angle and the erased rectangle are those of `--augment-on host`. Only the pixels differ, because a crop
is resized from an image that was shrunk before.

Weights and pixels of the resize are whole numbers, whose products and sums float32 and TF32 hold exactly. So an image
depends neither on the rest of its batch nor on the order in which a device adds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize_image

from export.predict import Preprocessing
from resnet_dist.data.exchange import Exchange
from resnet_dist.data.loader import EvalLoader, Keys, Share, TrainImages, mix_of_batch, unpacked
from resnet_dist.data.transforms import Batch
from resnet_dist.errors import DataError

Box = tuple[int, int, int, int]  # top, left, height, width
ONE = 2048.0  # the weight 1 of the resize: more would not fit the 11 bits of TF32
EDGE = 1e-3  # pixels: rounding must not let a box reach into the next pixel
AT_ONCE = 64  # images to resize at once: 0.5 GB of float32 at 224 pixels
ALIGNED = 4  # more pixels than the longest side of a crop: rounding, and a box that starts within a pixel


# ---------------------------------------------------------------------------------------------------------------------
# What happens to an image


@dataclass(frozen=True)
class Changes:
    """The random changes of one image, in their order; the flip comes last.

    Attributes:
        box: of the crop, in pixels of the decoded image; it may reach over its edges.
        colours: for each step of the colour jitter, 0 (brightness), 1 (contrast) or 2 (saturation), and its factor.
        angle: of the rotation, degrees.
        erased: the rectangle to fill, in pixels of the crop; of height 0 for none.
        flip: whether to mirror.
    """

    box: Box
    colours: tuple[tuple[int, float], ...] = ()
    angle: float = 0.0
    erased: Box = (0, 0, 0, 0)
    flip: bool = False

    def row(self, scale: tuple[float, float]) -> list[float]:
        """All but the flip as 16 numbers; `scale`: height and width of the kept image by those of the decoded one."""
        top, left, height, width = self.box
        box = [top * scale[0], left * scale[1], height * scale[0], width * scale[1]]
        colours = self.colours or ((0, 1.0),) * 3
        angle = math.radians(self.angle)
        jitter = [float(kind) for kind, _ in colours] + [factor for _, factor in colours]
        return [*box, *jitter, math.cos(angle), math.sin(angle), *map(float, self.erased)]


def steps_of(transform: v2.Transform | None) -> list[v2.Transform]:
    """The single transforms of `transforms.augment`, in their order."""
    if transform is None:
        return []
    return list(transform.transforms) if isinstance(transform, v2.Compose) else [transform]


def draw(key: int, steps: Sequence[v2.Transform], hflip: float, height: int, width: int, size: int) -> Changes:
    """The changes that `transforms.training_pixels` makes with this key to an image of height x width pixels."""
    if not steps:
        return Changes((0, 0, height, width))
    flip = draw_flip(key, steps, hflip)
    crop, *others = steps
    box = _box(crop.make_params([_of_shape(height, width)]))
    image = _of_shape(size, size)
    colours: tuple[tuple[int, float], ...] = ()
    angle, erased = 0.0, (0, 0, 0, 0)
    for step in others:
        if isinstance(step, v2.RandomErasing) and torch.rand(1) >= step.p:
            continue
        drawn = step.make_params([image])
        if isinstance(step, v2.ColorJitter):
            factors = [drawn["brightness_factor"], drawn["contrast_factor"], drawn["saturation_factor"]]
            colours = tuple((kind, factors[kind]) for kind in drawn["fn_idx"].tolist() if kind < 3)
        elif isinstance(step, v2.RandomRotation):
            angle = drawn["angle"]
        elif drawn["v"] is not None:
            erased = (drawn["i"], drawn["j"], drawn["h"], drawn["w"])
    return Changes(box, colours, angle, erased, flip)


def draw_flip(key: int, steps: Sequence[v2.Transform], hflip: float) -> bool:
    """Whether `draw` flips the image with this key. It is drawn first."""
    if not steps:
        return False
    torch.default_generator.manual_seed(key)
    return bool(torch.rand(()) < hflip)


def _of_shape(height: int, width: int) -> torch.Tensor:
    """What a transform needs of an image to draw: its shape."""
    return torch.empty(()).expand(3, height, width)


def _box(drawn: dict[str, int]) -> Box:
    left, top = drawn.get("padding", (0, 0))[:2]  # type: ignore[index]
    return drawn["top"] - top, drawn["left"] - left, drawn["height"], drawn["width"]


class DrawnImages(Dataset[Batch]):
    """Training samples without their pixels, which are on the device: how each of them changes.

    `sizes`: int64 (n, 4), height and width of each image when decoded, and as kept.
    """

    def __init__(self, images: TrainImages, sizes: np.ndarray) -> None:
        self.table, self.seed, self.cfg, self.size = images.table, images.seed, images.cfg, images.spec.img_size
        self.steps, self.sizes = steps_of(images.transform), sizes
        self._none = torch.empty(0, dtype=torch.uint8)

    def __getitems__(self, keys: Keys) -> Batch:
        """The batch of these keys, with `changes`."""
        _, positions, sample_keys = unpacked(keys, self.seed)
        changes, flips = self._draw(positions, sample_keys)
        return self._batch(positions, sample_keys, flips, changes)

    def _draw(self, rows: np.ndarray, sample_keys: np.ndarray) -> tuple[torch.Tensor, list[bool]]:
        """How the images in these rows of `sizes` change, float32 (n, 16), and which of them are flipped."""
        sizes = self.sizes[rows]
        drawn = [
            draw(key, self.steps, self.cfg.hflip, int(height), int(width), self.size)
            for key, (height, width) in zip(sample_keys.tolist(), sizes[:, :2], strict=True)
        ]
        scales = sizes[:, 2:] / sizes[:, :2]
        numbers = [changes.row(tuple(scale)) for changes, scale in zip(drawn, scales.tolist(), strict=True)]
        return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 16), [changes.flip for changes in drawn]

    def _batch(
        self,
        positions: np.ndarray,
        sample_keys: np.ndarray,
        flips: Sequence[bool],
        changes: torch.Tensor,
        exchange: Exchange | None = None,
    ) -> Batch:
        return Batch(
            self._none,
            torch.from_numpy(self.table.targets[positions]),
            torch.from_numpy(positions.copy()),
            torch.from_numpy(sample_keys),
            torch.tensor(flips) if any(flips) else None,
            mix_of_batch(sample_keys.tolist(), self.cfg, self.size),
            changes,
            exchange,
        )


class SpreadImages(DrawnImages):
    """Training samples whose pixels are spread over the devices of all processes; see `Exchange`.

    The keys are those of all processes (`TrainBatches` with `of_all`). The batch is that of this process, but `changes`
    are those of the images that this process keeps, for all processes.
    """

    def __init__(self, images: TrainImages, kept: "KeptImages", share: Share) -> None:
        super().__init__(images, kept.sizes)
        self.per_process, self.share = kept.per_process, share

    def __getitems__(self, keys: Keys) -> Batch:
        """The batch of this process, with `changes` and `exchange`."""
        world, rank, size = self.share.world, self.share.rank, self.share.batch_size
        _, positions, sample_keys = unpacked(keys, self.seed)
        keepers = positions // self.per_process
        here, own = np.flatnonzero(keepers == rank), slice(rank * size, (rank + 1) * size)
        rows = positions[here] - rank * self.per_process
        changes, _ = self._draw(rows, sample_keys[here])
        exchange = Exchange(
            torch.from_numpy(rows),
            torch.from_numpy(np.argsort(np.argsort(keepers[own], kind="stable"))),
            np.bincount(here // size, minlength=world).tolist(),
            np.bincount(keepers[own], minlength=world).tolist(),
        )
        flips = [draw_flip(key, self.steps, self.cfg.hflip) for key in sample_keys[own].tolist()]
        return self._batch(positions[own], sample_keys[own], flips, changes, exchange)


# ---------------------------------------------------------------------------------------------------------------------
# The images on the device


def short_side(spec: Preprocessing) -> int:
    """Pixels to which the short side of a kept image is reduced: --resize, or 1.5 times --img-size if that is more."""
    return max(spec.resize, spec.img_size * 3 // 2)


@dataclass
class _Shrunk(Batch):
    """Images of any size, uint8 (pixels, 3) one after the other in `images`; `sizes` as in DrawnImages."""

    sizes: np.ndarray | None = None


class _ShrunkImages(Dataset[Batch]):
    """The decoded training images by position, none with a short side above `short`."""

    def __init__(self, images: TrainImages, short: int) -> None:
        self.table, self.reader, self.short = images.table, images.reader, short
        self.filter = v2.InterpolationMode(images.spec.interpolation)

    def __getitems__(self, positions: np.ndarray) -> Batch | DataError:
        """The batch, or the error that prevents it (see TrainImages)."""
        try:
            decoded = [self.reader(index) for index in positions.tolist()]
        except DataError as error:
            return error
        shrunk = [self._shrink(pixels) for pixels in decoded]
        sizes = np.array([(*one.shape[:2], *other.shape[:2]) for one, other in zip(decoded, shrunk, strict=True)])
        pixels = np.concatenate([image.reshape(-1, 3) for image in shrunk])
        index = torch.from_numpy(positions)
        return _Shrunk(torch.from_numpy(pixels), index, index, index, sizes=sizes)

    def _shrink(self, pixels: np.ndarray) -> np.ndarray:
        """An image, uint8 (H, W, 3), at a short side of at most `short`."""
        factor = self.short / min(pixels.shape[:2])
        if factor >= 1:
            return pixels
        size = [round(factor * side) for side in pixels.shape[:2]]
        image = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
        small: torch.Tensor = resize_image(image, size, self.filter)[0]
        return small.permute(1, 2, 0).numpy()


class KeptImages:
    """The training images of a table on a device, decoded once and shrunk to `short_side`.

    `pixels`: uint8 (pixels, 3), image after image, row after row. `sizes`: see DrawnImages. Later changes of a file
    have no effect. With several processes (`world`), only the part of process `rank`: `per_process` images, fewer in
    the last parts. Raises DataError if an image cannot be decoded.
    """

    def __init__(self, images: TrainImages, device: torch.device, workers: int, world: int = 1, rank: int = 0) -> None:
        shrunk = _ShrunkImages(images, short_side(images.spec))
        batches = EvalLoader(shrunk, 32, workers, False, world, rank)
        self.per_process = batches.per_process
        parts = [torch.empty(0, 3, dtype=torch.uint8, device=device)]
        sizes = [np.empty((0, 4), np.int64)]
        for batch in batches:
            parts.append(batch.images.to(device))
            sizes.append(batch.sizes)  # type: ignore[attr-defined]
        self.pixels = torch.cat(parts)  # the parts and the whole: twice the memory for a moment
        parts.clear()
        torch.cuda.empty_cache()  # what is free is asked again, for validation images and features
        self.sizes = np.concatenate(sizes)


class AugmentOnDevice:
    """Batches of `DrawnImages` to pixels, on the device that has the images."""

    def __init__(self, kept: KeptImages, images: TrainImages) -> None:
        self.pixels, device = kept.pixels, kept.pixels.device
        heights, widths = kept.sizes[:, 2], kept.sizes[:, 3]
        first = np.cumsum(heights * widths) - heights * widths
        self.places = torch.from_numpy(np.stack([first, heights, widths], 1)).to(device)
        steps = steps_of(images.transform)
        self.size, self.kinds = images.spec.img_size, {type(step) for step in steps}
        self.bicubic = images.spec.interpolation == "bicubic"
        self.fill = torch.tensor(images.spec.fill, dtype=torch.float32, device=device)[:, None, None]
        self.window = self.size
        if steps and isinstance(steps[0], v2.RandomResizedCrop):  # so long at most, as its aspect ratio has a limit
            self.window = math.ceil(max(steps[0].ratio) * np.minimum(heights, widths).max(initial=1)) + ALIGNED

    @torch.no_grad()
    def __call__(self, batch: Batch) -> torch.Tensor:
        """The pixels of a batch before its flips, uint8 (B, img_size, img_size, 3).

        Every process must call this if the images are spread over them.
        """
        assert batch.changes is not None
        box, kinds, factors, turn, erased = torch.split(batch.changes, [4, 3, 3, 2, 4], 1)
        with torch.autocast(self.pixels.device.type, enabled=False):
            places = self.places[batch.index if batch.exchange is None else batch.exchange.rows]
            images = torch.cat(list(map(self._crops, torch.split(places, AT_ONCE), torch.split(box, AT_ONCE))))
            if v2.ColorJitter in self.kinds:
                images = jittered(images, kinds, factors)
            if v2.RandomRotation in self.kinds:
                images = rotated(images, turn, self.fill)
            if v2.RandomErasing in self.kinds:
                images = torch.where(_inside(erased, self.size), self.fill, images)
        images = images.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
        return images if batch.exchange is None else batch.exchange.swap(images)

    def _crops(self, places: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
        """The boxes, float32 (B, 4), of images at `places`, int64 (B, 3), resized: float32 (B, 3, S, S)."""
        first, _, width = torch.split(places, 1, 1)
        position, weights, sums = taps(box[:, :2], box[:, 2:], places[:, 1:], self.window, self.size, self.bicubic)
        (y, x), (down, across), (down_sum, across_sum) = position.unbind(1), weights.unbind(1), sums.unbind(1)
        index = (first + y * width)[:, :, None] + x[:, None, :]
        pixels = self.pixels[index].permute(0, 1, 3, 2).to(torch.float32, memory_format=torch.contiguous_format)
        rows = pixels.flatten(1, 2) @ across.mT
        rows = _whole(rows.div_(across_sum[:, None, :]))
        images = down @ rows.view(len(box), self.window, 3 * self.size)
        images = _whole(images.div_(down_sum[:, :, None]))
        return images.view(len(box), self.size, 3, self.size).permute(0, 2, 1, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels in batch: float32 with whole numbers from 0 to 255, as the host has them after every step


def taps(
    start: torch.Tensor, length: torch.Tensor, limit: torch.Tensor, window: int, size: int, bicubic: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The antialiased resize of a part of a line of `limit` pixels to `size` pixels, as torchvision weighs them.

    The part begins at `start` and has `length` pixels; all pixels that it touches are in the window. `limit`, `start`
    and `length` have one shape (...). Returns the window's pixels, int64 (..., window), within the line; their weights
    in whole numbers, float32 (..., size, window), 0 outside of the line; and the sums of the weights, (..., size), also
    of those outside.
    """
    device = start.device
    start, length, limit = start[..., None], length[..., None], limit[..., None]
    places = (start + EDGE).floor() + torch.arange(window, device=device)
    scale = length / size
    centres = start + scale * (torch.arange(size, device=device) + 0.5)
    distance = (places + 0.5)[..., None, :] - centres[..., None]
    distance = distance.abs_().div_(scale.clamp(min=1)[..., None])
    weights = (_cubic(distance) if bicubic else (1 - distance).clamp_(min=0)).mul_(ONE).round_()
    weights *= (places < (start + length - EDGE).ceil())[..., None, :]
    sums = weights.sum(-1)
    weights *= ((places >= 0) & (places < limit))[..., None, :]
    return torch.minimum(places.long().clamp_(min=0), limit - 1), weights, sums


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' cubic filter with a = -0.5, as Pillow and torch have it where they antialias."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _whole(values: torch.Tensor) -> torch.Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def jittered(images: torch.Tensor, kinds: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of (B, 3, S, S), each in its own order: see `Changes.colours`."""
    for step in range(3):
        kind, factor = kinds[:, step, None, None, None], factors[:, step, None, None, None]
        red, green, blue = torch.split(images, 1, 1)
        grey = (0.2989 * red + 0.587 * green + 0.114 * blue).floor_()
        other = torch.where(kind == 2, grey, torch.where(kind == 1, grey.mean((1, 2, 3), keepdim=True), 0.0))
        images = (images * factor + other * (1 - factor)).clamp_(0, 255).floor_()
    return images


def rotated(images: torch.Tensor, turn: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S), turned about the centre by the angles with cosine and sine `turn` (B, 2), corners in `fill`."""
    size = images.shape[-1]
    place = torch.arange(size, device=images.device) - (size - 1) / 2
    cos, sin = turn[:, :, None, None].unbind(1)
    x, y = place[None, None, :], place[None, :, None]
    grid = torch.stack([x * cos - y * sin, x * sin + y * cos], 3) / (size / 2)
    covered = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    pixels, cover = torch.split(F.grid_sample(covered, grid, align_corners=False), [3, 1], 1)
    return ((pixels - fill) * cover + fill).round_()


def _inside(box: torch.Tensor, size: int) -> torch.Tensor:
    """Which pixels are inside of the boxes (B, 4): bool (B, 1, size, size)."""
    top, left, height, width = torch.split(box[:, :, None, None], 1, 1)
    place = torch.arange(size, device=box.device)
    y, x = place[None, None, :, None], place[None, None, None, :]
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
