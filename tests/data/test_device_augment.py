"""Augmentation on the device against the host's: the same changes of every image, and pixels that are close."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from export.predict import Preprocessing
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.device_augment import (
    AugmentOnDevice,
    Changes,
    DrawnImages,
    KeptImages,
    draw,
    short_side,
    steps_of,
    taps,
)
from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.data.loader import Key, Share, TrainBatches, TrainImages, TrainLoader
from resnet_dist.data.transforms import Batch, ToInput, augment, sample_key, training_pixels
from resnet_dist.errors import DataError

CPU = torch.device("cpu")
SIZE = 48
SPEC = Preprocessing(img_size=SIZE, resize=56)
WHOLE = Preprocessing(img_size=SIZE, resize=400)  # no image is shrunk
OPTIONS: dict[str, dict[str, Any]] = {
    "crop": {},
    "narrow crops": {"crop_scale": (0.08, 0.1), "hflip": 0.0},
    "padding": {"crop": "random-pad", "crop_padding": 7},
    "colours": {"color_jitter": 0.4},
    "rotation": {"rotation": 30.0},
    "erasing": {"erasing": 0.7},
    "all": {"color_jitter": 0.3, "rotation": 180.0, "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0},
    "all with padding": {"color_jitter": 0.3, "rotation": 20.0, "erasing": 0.5, "crop": "random-pad"},
    "only mixing": {"aug": "none", "cutmix": 1.0},
}
SHAPES = [(160, 120), (120, 160), (90, 300), (61, 47), (500, 60), (200, 200), (30, 20), (129, 255)]


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Smooth areas, edges and a little noise."""
    random = np.random.default_rng(seed)
    areas = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 2)
    pixels = np.asarray(areas).astype(int)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 256, 3)
    return Image.fromarray((pixels + random.integers(-3, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """Images of many shapes, also smaller than the input and very wide."""
    root = tmp_path_factory.mktemp("photographs")
    for number, (width, height) in enumerate(SHAPES):
        photograph(number, width, height).save(root / f"{number}.png")
    return ImageTable(root, PathTable([f"{n}.png" for n in range(len(SHAPES))]), np.arange(len(SHAPES)) % 3)


def images_of(table: ImageTable, options: dict[str, Any], spec: Preprocessing = SPEC) -> TrainImages:
    return TrainImages(table, spec, AugmentConfig(**options), seed=3)


def both(images: TrainImages, keys: Sequence[Key]) -> tuple[Batch, Batch, torch.Tensor]:
    """The batch of the host, that of the device, and the pixels of the latter."""
    kept = KeptImages(images, CPU, 0)
    host, drawn = images.__getitems__(keys), DrawnImages(images, kept.sizes).__getitems__(keys)
    assert isinstance(host, Batch)
    return host, drawn, AugmentOnDevice(kept, images)(drawn)


def psnr(one: torch.Tensor, two: torch.Tensor) -> float:
    """Decibels; more is closer."""
    error = float((one.double() - two.double()).square().mean())
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


KEYS = [(epoch, index) for epoch in range(4) for index in range(len(SHAPES))]


# ---------------------------------------------------------------------------------------------------------------------
# The same changes


def host_changes(key: int, transform: v2.Transform, hflip: float, pixels: np.ndarray) -> Changes:
    """What the transforms of the host drew, noted while they changed the image."""
    drawn: dict[type, dict[str, Any]] = {}
    for step in steps_of(transform):

        def make_params(flat: Any, step: Any = step, real: Any = step.make_params) -> Any:
            drawn[type(step)] = real(flat)
            return drawn[type(step)]

        step.make_params = make_params
    _, flip = training_pixels(pixels, key, transform, hflip)
    named = {kind.__name__: params for kind, params in drawn.items()}
    crop = named.get("RandomResizedCrop") or named["RandomCrop"]
    left, top = crop.get("padding", [0, 0])[:2]
    colours = named.get("ColorJitter", {"fn_idx": torch.tensor([])})
    names = ["brightness_factor", "contrast_factor", "saturation_factor"]
    erased = named.get("RandomErasing", {"v": None})
    return Changes(
        (crop["top"] - top, crop["left"] - left, crop["height"], crop["width"]),
        tuple((kind, colours[names[kind]]) for kind in colours["fn_idx"].tolist() if kind < 3),
        named.get("RandomRotation", {"angle": 0.0})["angle"],
        (0, 0, 0, 0) if erased["v"] is None else tuple(erased[name] for name in "ijhw"),
        flip,
    )


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "only mixing"])
def test_changes_are_those_of_the_host(table: ImageTable, name: str) -> None:
    images = images_of(table, OPTIONS[name])
    cfg = images.cfg
    for index in range(len(SHAPES)):
        pixels = images.reader(index)
        for epoch in range(10):
            key = sample_key(3, epoch, index)
            transform = augment(cfg, SPEC)
            assert transform is not None
            expected = host_changes(key, transform, cfg.hflip, pixels)
            assert draw(key, steps_of(augment(cfg, SPEC)), cfg.hflip, *pixels.shape[:2], SIZE) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_everything_but_the_pixels_is_equal(table: ImageTable, name: str) -> None:
    """Targets, order, keys, flips, and how pairs are mixed."""
    host, drawn, _ = both(images_of(table, OPTIONS[name]), KEYS)
    for field in ("targets", "index", "keys", "flip", "mix"):
        one, two = getattr(host, field), getattr(drawn, field)
        assert one is two is None or torch.equal(one, two), field
    assert len(drawn.images) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Close pixels


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", OPTIONS)
def test_pixels_are_nearly_those_of_the_host_where_nothing_was_shrunk(
    table: ImageTable, name: str, interpolation: str
) -> None:
    """At most 2 % differ, by a level or two of 255; where colours follow, few by more."""
    spec = Preprocessing(img_size=SIZE, resize=400, interpolation=interpolation)
    if OPTIONS[name].get("crop") == "random-pad":
        spec = Preprocessing(img_size=SIZE, resize=56, interpolation=interpolation)
    host, _, pixels = both(images_of(table, OPTIONS[name], spec), KEYS)
    away = (host.images.int() - pixels.int()).abs()
    assert float((away > 0).float().mean()) < 0.02
    assert int(away.max()) <= (6 if OPTIONS[name].get("color_jitter") else 2)
    assert psnr(host.images, pixels) > 60
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()


def test_shrunk_images_give_close_pixels(table: ImageTable) -> None:
    """Photographs two to seven times as large as the input."""
    for options in ({}, {"color_jitter": 0.3, "rotation": 10.0}):
        host, _, pixels = both(images_of(table, options), KEYS)
        assert psnr(host.images, pixels) > 32
        assert min(psnr(one, two) for one, two in zip(host.images, pixels, strict=True)) > 22


def test_padding_is_exact(table: ImageTable) -> None:
    host, _, pixels = both(images_of(table, OPTIONS["padding"]), KEYS)
    assert torch.equal(host.images, pixels)


def test_scaled_decoding_works_alike(tmp_path: Path) -> None:
    """The crop is drawn from the size at which the JPEG is decoded, here a half."""
    photograph(1, 400, 300).save(tmp_path / "1.jpg")
    table = ImageTable(tmp_path, PathTable(["1.jpg"]), np.zeros(1, np.int64))
    images = images_of(table, {"scaled_decode": True}, WHOLE)
    assert KeptImages(images, CPU, 0).sizes.tolist() == [[150, 200, 150, 200]]
    host, _, pixels = both(images, [(epoch, 0) for epoch in range(8)])
    assert psnr(host.images, pixels) > 60


def test_a_flat_image_stays_flat(tmp_path: Path) -> None:
    """Whatever the weights are rounded to."""
    Image.new("RGB", (211, 97), (255, 128, 1)).save(tmp_path / "flat.png")
    flat = ImageTable(tmp_path, PathTable(["flat.png"]), np.zeros(1, np.int64))
    _, _, pixels = both(images_of(flat, {}), [(epoch, 0) for epoch in range(30)])
    assert torch.equal(pixels, torch.tensor([255, 128, 1], dtype=torch.uint8).expand_as(pixels))


@pytest.mark.parametrize("bicubic", [False, True])
def test_weights_are_whole_numbers_that_tf32_holds(bicubic: bool) -> None:
    """So that products and sums are exact on every device, in every order: at most 11 bits, and sums below 2**24."""
    start, length = torch.tensor([0.3, 10.0, 5.5]), torch.tensor([170.0, 20.5, 48.0])
    _, weights, sums = taps(start, length, torch.full((3,), 200), 180, SIZE, bicubic)
    assert torch.equal(weights, weights.round()) and int(weights.abs().max()) <= 2048
    assert float((weights.abs().sum(2) * 255).max()) < 2**24
    assert torch.equal(sums, weights.sum(2)) and float(sums.min()) > 1000


# ---------------------------------------------------------------------------------------------------------------------
# Nothing else matters


@pytest.mark.parametrize("name", OPTIONS)
def test_an_image_does_not_depend_on_its_batch(table: ImageTable, name: str) -> None:
    """All at once, one at a time and in another order; whatever was drawn before."""
    images = images_of(table, OPTIONS[name])
    kept = KeptImages(images, CPU, 0)
    drawn, on_device = DrawnImages(images, kept.sizes), AugmentOnDevice(kept, images)
    whole = on_device(drawn.__getitems__(KEYS))
    for number, key in enumerate(KEYS):
        torch.manual_seed(number)
        assert torch.equal(on_device(drawn.__getitems__([key]))[0], whole[number])
    backwards = on_device(drawn.__getitems__(KEYS[::-1]))
    assert torch.equal(backwards, whole.flip(0))


def inputs(images: TrainImages, share: Share, workers: int, first_step: int = 0) -> list[torch.Tensor]:
    """What the network gets in each step of the second epoch."""
    kept = KeptImages(images, CPU, workers)
    batches = TrainBatches(len(images.table), 3, share, drop_last=False)
    loader = TrainLoader(DrawnImages(images, kept.sizes), batches, workers, pin_memory=False)
    to_input = ToInput(images.spec, CPU, AugmentOnDevice(kept, images))
    return [torch.cat(list(map(to_input, step))) for step in loader.epoch(1, first_step)]


def test_steps_do_not_depend_on_workers_processes_and_interruptions(table: ImageTable) -> None:
    images = images_of(table, OPTIONS["all"])
    whole = inputs(images, Share(4), 0)
    assert len(whole) == 2
    for workers, first_step in ((2, 0), (0, 1), (1, 1)):
        found = inputs(images, Share(4), workers, first_step)
        assert all(map(torch.equal, found, whole[first_step:]))
    parts = [inputs(images, Share(2, world=2, rank=rank), 0) for rank in range(2)]
    assert all(torch.equal(torch.cat(step), one) for step, one in zip(zip(*parts, strict=True), whole, strict=True))
    accumulated = inputs(images, Share(2, accumulate=2), 0)
    assert all(map(torch.equal, accumulated, whole))


def test_images_are_kept_no_larger_than_needed(table: ImageTable) -> None:
    """The short side at most 1.5 times the input; small images as they are; in the evaluation geometry for padding."""
    assert short_side(SPEC) == 72 and short_side(WHOLE) == 400
    kept = KeptImages(images_of(table, {}), CPU, 0)
    assert [tuple(size) for size in kept.sizes[:, :2]] == [(height, width) for width, height in SHAPES]
    assert [min(size) for size in kept.sizes[:, 2:].tolist()] == [min(72, *shape) for shape in SHAPES]
    assert len(kept.pixels) == int((kept.sizes[:, 2] * kept.sizes[:, 3]).sum())
    fitted = KeptImages(images_of(table, OPTIONS["padding"]), CPU, 0)
    assert (fitted.sizes == SIZE).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, workers: int) -> None:
    photograph(0, 60, 60).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    table = ImageTable(tmp_path, PathTable(["0.png", "1.png"]), np.zeros(2, np.int64))
    with pytest.raises(DataError, match=r"1\.png"):
        KeptImages(images_of(table, {}), CPU, workers)


def test_flips_come_last_and_where_the_input_is_made(table: ImageTable) -> None:
    images = images_of(table, {"hflip": 1.0})
    _, drawn, pixels = both(images, KEYS)
    assert drawn.flip is not None and bool(drawn.flip.all())
    kept = KeptImages(images, CPU, 0)
    mirrored = ToInput(SPEC, CPU, AugmentOnDevice(kept, images))(drawn)
    expected = ToInput(SPEC, CPU)(Batch(pixels.flip(2), drawn.targets, drawn.index, drawn.keys))
    assert torch.equal(mirrored, expected)
