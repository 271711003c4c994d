"""Random geometry as a function of the sample alone, and the float input, against torchvision and plain loops."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from export.predict import Preprocessing, fit, normalise
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.exchange import Exchange
from resnet_dist.data.transforms import (
    Batch,
    ToInput,
    augment,
    mirrored,
    mix_of_pair,
    sample_key,
    sample_keys,
    starts_fitted,
    swap_pairs,
    training_pixels,
)

SPEC = Preprocessing(img_size=16, resize=18)
# A picture with neither symmetry nor flat areas, so that every change of geometry or colour shows.
IMAGE = Image.fromarray(np.random.default_rng(5).integers(30, 220, (30, 40, 3), dtype=np.uint8))
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "random-resized": {},
    "random-pad": {"crop": "random-pad"},
    "trivial": {"aug": "trivial"},
    "randaug": {"aug": "randaug"},
    "jitter": {"color_jitter": 0.4},
    "rotation": {"rotation": 30.0},
    "erasing": {"erasing": 1.0},
    "all at once": {"aug": "randaug", "color_jitter": 0.4, "rotation": 30.0, "erasing": 1.0, "crop": "random-pad"},
}


def pixels_of(key: int, options: dict[str, Any], spec: Preprocessing = SPEC) -> tuple[np.ndarray, bool]:
    cfg = AugmentConfig(**options)
    pixels = fit(IMAGE, spec) if starts_fitted(cfg) else np.array(IMAGE)
    return training_pixels(pixels, key, augment(cfg, spec), cfg.hflip)


def keys(count: int) -> list[int]:
    return [sample_key(0, 0, index) for index in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Keys

GOLDEN_GAMMA = np.array(0x9E3779B97F4A7C15, np.uint64)


def splitmix64(state: np.ndarray) -> np.ndarray:
    """One output of the generator (Steele, Lea and Flood, 2014), in wrapping 64-bit arithmetic."""
    mixed = state + GOLDEN_GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def test_the_reference_generator_is_splitmix64() -> None:
    """The published outputs for seed 1234567."""
    states = np.array([1234567], np.uint64) + GOLDEN_GAMMA * np.arange(3, dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    ("seed", "epoch", "index", "pinned"),
    [
        (0, 0, 0, 1279368494785126216),
        (0, 0, 1, 1700482428262628912),
        (1, 0, 0, 6396520470166291297),
        (7, 12, 123_456, 4117997142134412009),
        (0, 3, -1, 40580844221524856),
        (2**62, 1, 2**40, 2985370480711316928),
    ],
)
def test_keys_are_stable(seed: int, epoch: int, index: int, pinned: int) -> None:
    """Written down, and equal to a chain of splitmix64: a changed key would change every run that is resumed."""
    state = np.zeros(1, np.uint64)
    for part in (seed, epoch, index):
        state = splitmix64(state ^ np.array([part], np.int64).view(np.uint64))
    assert sample_key(seed, epoch, index) == int(state[0]) >> 1 == pinned


def test_keys_are_distinct_and_fit_an_int64() -> None:
    """Also if the three numbers are permuted."""
    found = [sample_key(s, e, i) for s in range(3) for e in range(20) for i in range(3000)]
    assert len(set(found)) == len(found)
    assert min(found) >= 0
    assert max(found) < 2**63
    bits = np.array(found)[:, None] >> np.arange(63) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(found))


# ---------------------------------------------------------------------------------------------------------------------
# Geometry and colour on the host


def spoil(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


@pytest.mark.parametrize("options", AUGMENTATIONS.values(), ids=list(AUGMENTATIONS))
def test_pixels_are_a_function_of_the_key_alone(options: dict[str, Any]) -> None:
    seen = []
    for value in (1, 2):
        spoil(value)
        seen.append([pixels_of(key, options) for key in keys(10)])
    for (one, one_flip), (two, two_flip) in zip(*seen, strict=True):
        assert np.array_equal(one, two)
        assert one_flip == two_flip


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_aug_none_is_the_evaluation_geometry(mode: str) -> None:
    spec = Preprocessing(img_size=16, resize=16 if mode != "crop" else 18, resize_mode=mode)
    for key in keys(5):
        seen, flip = pixels_of(key, {"aug": "none", "hflip": 1.0}, spec)
        assert np.array_equal(seen, fit(IMAGE, spec))
        assert not flip


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_change_pixels_and_keep_the_shape(name: str) -> None:
    """Crops, compared with the evaluation geometry; the others, with the same crop alone."""
    options = AUGMENTATIONS[name]
    without = {"aug": "none"} if name.startswith("random-") else {"crop": options.get("crop", "random-resized")}
    seen = [pixels_of(key, options)[0] for key in keys(20)]
    assert {(pixels.shape, pixels.dtype) for pixels in seen} == {((16, 16, 3), np.dtype(np.uint8))}
    same = sum(np.array_equal(one, pixels_of(key, without)[0]) for one, key in zip(seen, keys(20), strict=True))
    assert same <= 8


def reference_pixels(key: int, transform: v2.Transform, image: np.ndarray) -> np.ndarray:
    """torchvision's transform after the one draw that decides about the flip."""
    torch.manual_seed(key)
    torch.rand(())
    changed: torch.Tensor = transform(torch.from_numpy(image.copy()).permute(2, 0, 1))
    return changed.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)])
def test_random_resized_crop_equals_torchvision(interpolation: str, scale: tuple[float, float]) -> None:
    spec = Preprocessing(img_size=16, resize=18, interpolation=interpolation)
    reference = v2.RandomResizedCrop(16, scale=scale, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    for key in keys(10):
        expected = reference_pixels(key, reference, np.asarray(IMAGE))
        assert np.array_equal(pixels_of(key, {"crop_scale": scale}, spec)[0], expected)


def test_random_pad_equals_torchvisions_random_crop() -> None:
    reference = v2.RandomCrop(16, padding=3)
    for key in keys(10):
        expected = reference_pixels(key, reference, fit(IMAGE, SPEC))
        assert np.array_equal(pixels_of(key, {"crop": "random-pad", "crop_padding": 3})[0], expected)


def test_erasing_fills_with_the_mean_colour() -> None:
    spec = Preprocessing(img_size=16, resize=18, fill=(1, 2, 3))
    for key in keys(5):
        before, after = pixels_of(key, {}, spec)[0], pixels_of(key, {"erasing": 1.0}, spec)[0]
        changed = (before != after).any(axis=-1)
        assert changed.any()
        assert (after[changed] == (1, 2, 3)).all()


@pytest.mark.parametrize(("hflip", "low", "high"), [(0.0, 0, 0), (1.0, 1500, 1500), (0.3, 361, 539)])
def test_flips_have_the_given_probability(hflip: float, low: int, high: int) -> None:
    """Of 1500; five standard deviations of sqrt(1500 * 0.3 * 0.7) = 17.7 about 450."""
    cfg = AugmentConfig(hflip=hflip)
    transform = augment(cfg, SPEC)
    assert low <= sum(training_pixels(np.array(IMAGE), key, transform, hflip)[1] for key in keys(1500)) <= high


# ---------------------------------------------------------------------------------------------------------------------
# To float on the device


def batch_of(images: np.ndarray, flip: list[bool] | None = None, mix: list[Any] | None = None) -> Batch:
    count = len(images)
    return Batch(
        torch.from_numpy(images),
        torch.arange(count),
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
        None if flip is None else torch.tensor(flip),
        None if mix is None else torch.tensor(mix, dtype=torch.float32),
    )


def noise(count: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def to_input(batch: Batch) -> np.ndarray:
    """What the network gets, channels last."""
    values = ToInput(SPEC, torch.device("cpu"))(batch)
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert values.dtype == torch.float32
    return values.permute(0, 2, 3, 1).numpy()


def test_input_is_bit_equal_to_the_predictor() -> None:
    """For every value of every channel."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    images = np.stack([levels, levels[:, ::-1], levels.swapaxes(1, 2)], axis=-1)
    assert np.array_equal(to_input(batch_of(images)), normalise(images, SPEC))


def test_flips_happen_on_the_device_sample_by_sample() -> None:
    images, flip = noise(4), [True, False, False, True]
    before = images.copy()
    expected = np.stack([image[:, ::-1] if flipped else image for image, flipped in zip(images, flip, strict=True)])
    assert np.array_equal(to_input(batch_of(images, flip)), normalise(expected, SPEC))
    assert np.array_equal(images, before)


def mixed_by_hand(values: np.ndarray, rows: list[tuple[float, int, int, int, int]]) -> np.ndarray:
    """One image after the other: a box of the partner's pixels (CutMix) or a weighted sum (MixUp)."""
    out = values.copy()
    for i, (share, left, top, right, bottom) in enumerate(rows):
        partner = values[i + 1 if i % 2 == 0 else i - 1]
        if right > left:
            out[i, top:bottom, left:right] = partner[top:bottom, left:right]
        else:
            out[i] = np.float32(share) * values[i] + (1 - np.float32(share)) * partner
    return out


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}], ids=str)
def test_mix_equals_a_loop_over_pairs(options: dict[str, float]) -> None:
    """After the flips, and the targets of the partners are those of the other one of the pair."""
    images, flip = noise(24), [i % 3 == 0 for i in range(24)]
    rows = [mix_of_pair(sample_key(3, 1, i // 2), AugmentConfig(**options), 16) for i in range(24)]  # type: ignore[arg-type]
    flipped = np.stack([image[:, ::-1] if f else image for image, f in zip(images, flip, strict=True)])
    batch = batch_of(images, flip, rows)
    np.testing.assert_allclose(to_input(batch), mixed_by_hand(normalise(flipped, SPEC), rows), rtol=0, atol=1e-6)
    assert batch.partners.tolist() == [i + 1 if i % 2 == 0 else i - 1 for i in range(24)]


def test_swap_pairs_of_any_shape() -> None:
    assert swap_pairs(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert swap_pairs(torch.arange(8).reshape(4, 2)).tolist() == [[2, 3], [0, 1], [6, 7], [4, 5]]


# ---------------------------------------------------------------------------------------------------------------------
# How a pair is mixed


@pytest.mark.parametrize("size", [16, 32, 33, 224])
def test_cutmix_weight_is_the_area_outside_the_box(size: int) -> None:
    for key in keys(2000):
        share, left, top, right, bottom = mix_of_pair(key, AugmentConfig(cutmix=1.0), size)
        assert 0 <= left <= right <= size
        assert 0 <= top <= bottom <= size
        own = np.ones((size, size))
        own[top:bottom, left:right] = 0
        assert share == pytest.approx(own.mean(), abs=1e-12)


@pytest.mark.parametrize("size", [16, 32, 224])
@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"mixup": 0.2}, {"cutmix": 1.0}, {"cutmix": 50.0}], ids=str)
def test_own_label_has_at_least_half_the_weight(options: dict[str, float], size: int) -> None:
    cfg = AugmentConfig(**options)  # type: ignore[arg-type]
    shares = [mix_of_pair(key, cfg, size)[0] for key in keys(5000)]
    assert min(shares) >= 0.5
    assert max(shares) <= 1
    assert max(shares) - min(shares) > 0.2


def test_mixup_weight_has_the_beta_distribution() -> None:
    """Beta(1, 1) is uniform, so the larger share is uniform on 0.5 .. 1: mean 0.75, standard deviation 1 / sqrt(48)."""
    rows = [mix_of_pair(key, AugmentConfig(mixup=1.0), 16) for key in keys(4000)]
    assert all(row[1:] == (0, 0, 0, 0) for row in rows)
    assert abs(np.mean([row[0] for row in rows]) - 0.75) < 5 / math.sqrt(48 * 4000)


def test_each_pair_uses_either_mixup_or_cutmix() -> None:
    """Half of 4000 each, within five standard deviations; few boxes have rounded to nothing."""
    rows = [mix_of_pair(key, AugmentConfig(mixup=1.0, cutmix=1.0), 224) for key in keys(4000)]
    boxes = sum(right > left for _, left, _, right, _ in rows)
    assert abs(boxes - 2000) < 5 * math.sqrt(1000)


def test_batch_moves_all_its_tensors() -> None:
    """Also those that say which images come from other processes."""
    batch = batch_of(noise(4), [True, False, True, False], [(0.5, 0, 0, 0, 0)] * 4)
    batch.changes = torch.zeros(4, 16)
    batch.exchange = Exchange(torch.tensor([3]), torch.tensor([0, 1]), [1, 0], [0, 2])
    moved = batch.to(torch.device("meta"))
    assert [(t.shape, t.dtype) for t in moved.tensors] == [(t.shape, t.dtype) for t in batch.tensors]
    assert len(moved.tensors) == 9 and all(tensor.is_meta for tensor in moved.tensors)
    assert moved.exchange is not None and (moved.exchange.sent, moved.exchange.received) == ([1, 0], [0, 2])


def test_flips_equal_numpy_and_do_not_change_the_batch() -> None:
    """Some of a batch, none and all."""
    images = np.random.default_rng(3).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    batch = torch.from_numpy(images.copy())
    for flips in ([True, False, False, True, False], [False] * 5, [True] * 5):
        flip = torch.tensor(flips)
        expected = np.stack([image[:, ::-1] if f else image for image, f in zip(images, flips, strict=True)])
        assert np.array_equal(mirrored(batch, flip).numpy(), expected)
    assert np.array_equal(batch.numpy(), images)


def test_keys_of_many_samples_are_those_of_each() -> None:
    random = np.random.default_rng(0)
    for seed in (0, 7, 2**63 - 1, sample_key(3, -2, -1)):
        epochs, positions = random.integers(0, 1000, 200), random.integers(0, 2**40, 200)
        expected = [sample_key(seed, *pair) for pair in zip(epochs.tolist(), positions.tolist(), strict=True)]
        assert sample_keys(seed, epochs, positions).tolist() == expected
