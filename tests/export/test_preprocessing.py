"""From image files to the network's input: what is decoded, what is refused, and the evaluation geometry."""

import io
import json
import os
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torchvision import transforms

from export.predict import ImageError, Preprocessing, canonical_json, decode, fit, normalise

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (7, 11, 3), dtype=np.uint8)
GREY16 = np.array([[0, 128, 129, 386], [32768, 65280, 65407, 65535]], np.uint16)
CIFAR: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Alpha compositing as in the textbook, in floating point."""
    return np.rint((colour * (alpha / 255)) + 255 * (1 - alpha / 255))


def palette_image() -> Image.Image:
    """A row of the three palette colours red, green and (1, 2, 3)."""
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 1, 2, 3])
    image.putdata([0, 1, 2])
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Modes

RGB = Image.new("RGB", (8, 8), (10, 200, 90))
CMYK = Image.new("CMYK", (8, 8), (51, 102, 153, 51))
CMYK_AS_RGB = (204 * 204 / 255, 153 * 204 / 255, 102 * 204 / 255)  # (1 - ink) * (1 - black)


@pytest.mark.parametrize(
    ("data", "pixel", "tolerance"),
    [
        pytest.param(encoded(RGB, "PNG"), (10, 200, 90), 0, id="RGB"),
        pytest.param(encoded(RGB, "BMP"), (10, 200, 90), 0, id="BMP"),
        pytest.param(encoded(RGB, "PPM"), (10, 200, 90), 0, id="PPM"),
        pytest.param(encoded(RGB, "WEBP", lossless=True), (10, 200, 90), 0, id="WebP"),
        pytest.param(encoded(RGB, "MPO", save_all=True), (10, 200, 90), 3, id="MPO, the JPEG of telephones"),
        pytest.param(encoded(Image.new("L", (8, 8), 131), "PNG"), (131, 131, 131), 0, id="L"),
        pytest.param(encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255), 0, id="1 white"),
        pytest.param(encoded(Image.new("1", (8, 8), 0), "TIFF"), (0, 0, 0), 0, id="1 black"),
        pytest.param(encoded(palette_image().resize((1, 1)), "PNG"), (0, 255, 0), 0, id="P"),
        pytest.param(encoded(CMYK, "TIFF"), CMYK_AS_RGB, 1, id="CMYK TIFF"),
        pytest.param(encoded(CMYK, "JPEG", quality=100), CMYK_AS_RGB, 2, id="CMYK JPEG"),
    ],
)
def test_every_eight_bit_mode_becomes_rgb(data: bytes, pixel: tuple[float, ...], tolerance: float) -> None:
    image = decode(data)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[0, 0].astype(float), pixel, atol=tolerance)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_alpha_is_composited_on_white(mode: str, file_format: str) -> None:
    """Colour that hides under alpha 0 is white, opaque colour stays as it is, and between them it is mixed."""
    pixels = RNG.integers(0, 256, (8, 8, len(mode)), dtype=np.uint8)
    pixels[0, :, -1], pixels[1, :, -1] = 0, 255
    seen = np.asarray(decode(encoded(Image.fromarray(pixels, mode), file_format)))
    expected = on_white(pixels[..., :-1].astype(float), pixels[..., -1:].astype(float))
    np.testing.assert_allclose(seen, np.broadcast_to(expected, seen.shape), atol=1)
    assert (seen[0] == 255).all()
    assert (seen[1] == pixels[1, :, :-1]).all()


@pytest.mark.parametrize(
    ("image", "transparency", "expected"),
    [
        (palette_image(), bytes([0, 51, 255]), [(255, 255, 255), (204, 255, 204), (1, 2, 3)]),
        (palette_image(), 1, [(255, 0, 0), (255, 255, 255), (1, 2, 3)]),
        (palette_image().convert("RGB"), (1, 2, 3), [(255, 0, 0), (0, 255, 0), (255, 255, 255)]),
        (Image.fromarray(np.array([[5, 6, 7]], np.uint8)), 6, [(5, 5, 5), (255, 255, 255), (7, 7, 7)]),
        (Image.fromarray(np.array([[257, 514, 65535]], np.uint16)), 514, [(1, 1, 1), (255, 255, 255), (255, 255, 255)]),
        (Image.fromarray(np.array([[257, 514, 25700]], np.uint16)), 257, [(255, 255, 255), (2, 2, 2), (100, 100, 100)]),
    ],
    ids=["P with alpha per colour", "P with one clear colour", "RGB", "L", "16-bit", "16-bit and its darkest"],
)
def test_transparent_colour_of_a_png_becomes_white(image: Image.Image, transparency: Any, expected: Any) -> None:
    """And all other colours are what they would be without it (16-bit grey scaled, not clipped)."""
    seen = np.asarray(decode(encoded(image, "PNG", transparency=transparency)))[0]
    np.testing.assert_allclose(seen.astype(int), expected, atol=1)


@pytest.mark.parametrize(("file_format", "order"), [("PNG", "<u2"), ("PPM", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bit_grey_is_scaled_not_clipped(file_format: str, order: str) -> None:
    seen = np.asarray(decode(encoded(Image.fromarray(GREY16.astype(order)), file_format)))
    assert (seen == np.rint(GREY16 / 257)[..., None]).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [(np.float32(0.5), "floating-point"), (np.int32(65536), "32-bit"), (np.int32(-1), "32-bit")],
)
def test_pixels_of_unknown_range_are_refused(values: np.generic, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(encoded(Image.fromarray(np.full((4, 4), values)), "TIFF"))


# ---------------------------------------------------------------------------------------------------------------------
# Orientation, animation

# How the camera stores an upright picture, by the Exif standard's "row 0 is the visual ..., column 0 the visual ...".
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An Exif block of (tag, type, count, four bytes of value), as a camera might write it."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


def orientation(value: int) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack("<HH", value, 0)


@pytest.mark.parametrize("value", STORED)
@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [("PNG", {}, 0), ("TIFF", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 100, "subsampling": 0}, 5)],
)
def test_exif_orientation_is_applied(file_format: str, options: dict[str, Any], tolerance: int, value: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[value](NOISE)))
    block: Any = exif(orientation(value))
    if file_format == "TIFF":  # there the tag stands in the file's own directory
        block = Image.Exif()
        block[0x0112] = value
    seen = np.asarray(decode(encoded(stored, file_format, exif=block, **options)))
    assert seen.shape == NOISE.shape
    np.testing.assert_allclose(seen.astype(int), NOISE.astype(int), atol=tolerance)


@pytest.mark.parametrize("image", [Image.fromarray(GREY16), palette_image()], ids=["16-bit", "palette"])
def test_orientation_of_other_modes(image: Image.Image) -> None:
    plain = np.asarray(decode(encoded(image, "PNG")))
    assert (np.asarray(decode(encoded(image, "PNG", exif=exif(orientation(3))))) == plain[::-1, ::-1]).all()


@pytest.mark.parametrize(
    "odd",
    [(0x010F, 11, 1, struct.pack("<f", 1.5)), (0x0100, 16, 1, bytes([1, 0, 0, 0])), (0x0131, 99, 1, bytes(4))],
    ids=["text stored as a float", "eight bytes in four", "unknown type"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's word on them
def test_malformed_exif_does_not_make_an_image_unusable(odd: tuple[int, int, int, bytes]) -> None:
    data = encoded(Image.fromarray(NOISE), "PNG", exif=exif(orientation(6), odd))
    assert (np.asarray(decode(data)) == np.rot90(NOISE, -1)).all()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(file_format: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert (np.asarray(decode(data)) == (255, 0, 0)).all()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_wrong_extension_does_not_matter_and_bytes_are_as_good_as_a_file(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(NOISE), "PNG")
    file = tmp_path / "really a png.jpg"
    file.write_bytes(data)
    for source in (file, str(file), data):
        assert (np.asarray(decode(source)) == NOISE).all()


def test_an_eps_named_jpg_never_reaches_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, ghostscript, marker = tmp_path / "photo.jpg", tmp_path / "gs", tmp_path / "marker"
    file.write_bytes(encoded(RGB, "EPS"))
    ghostscript.write_text(f"#!/bin/sh\ntouch '{marker}'\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises((OSError, subprocess.CalledProcessError)), Image.open(file) as image:
        image.load()
    assert marker.exists(), "the trap itself does not work"
    marker.unlink()
    with pytest.raises(ImageError, match="format"):
        decode(file)
    assert not marker.exists()


@pytest.mark.parametrize("file_format", ["EPS", "ICO", "TGA", "PCX", "ICNS", "SGI", "JPEG2000", "DDS"])
def test_formats_that_are_not_listed_are_refused(file_format: str) -> None:
    with pytest.raises(ImageError, match=r"not an image in a supported format \(JPEG, PNG"):
        decode(encoded(RGB.resize((16, 16)), file_format))


JPEG = encoded(noise(64, 48), "JPEG")


@pytest.mark.parametrize(
    "data",
    [JPEG[: len(JPEG) // 2], JPEG[:-2], encoded(noise(64, 48), "PNG")[:900], b"", b"<html>404 Not Found</html>"],
    ids=["cut in the middle", "only the end marker missing", "cut PNG", "empty", "text"],
)
def test_damaged_files_are_an_image_error_in_one_line_without_path(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "damaged.jpg"
    file.write_bytes(data)
    for source in (file, data):
        with pytest.raises(ImageError) as caught:
            decode(source)
        assert "\n" not in str(caught.value)
        assert "damaged.jpg" not in str(caught.value)


def test_a_file_that_cannot_be_opened_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "missing.jpg")
    with pytest.raises(IsADirectoryError):
        decode(tmp_path)


def png_of_size(width: int, height: int) -> bytes:
    """A small PNG file with a header for that many grey pixels, and without the pixels."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0"),
        b"IEND": b"",
    }
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("filtered", ["error", "ignore"])
@pytest.mark.parametrize("side", [8001, 12_000, 20_000], ids=["own limit", "Pillow's warning", "Pillow's error"])
def test_too_many_pixels_are_refused_from_the_header(side: int, filtered: Any) -> None:
    """Before decoding, which would fail because pixels are missing, and with any setting of Pillow's warning."""
    with warnings.catch_warnings():
        warnings.simplefilter(filtered)
        with pytest.raises(ImageError, match="limit of 64000000"):
            decode(png_of_size(side, 8000))


def test_the_pixel_limit_itself_is_allowed() -> None:
    data = encoded(noise(20, 15), "PNG")
    assert decode(data, max_pixels=300).size == (20, 15)
    with pytest.raises(ImageError, match="20x15 pixels, more than the limit of 299"):
        decode(data, max_pixels=299)


VALID = [
    encoded(Image.fromarray(NOISE), "JPEG", exif=exif(orientation(6))),
    encoded(Image.fromarray(NOISE), "PNG", exif=exif(orientation(8))),
    encoded(palette_image(), "PNG", transparency=0),
    encoded(Image.fromarray(NOISE).quantize(8), "GIF", save_all=True, append_images=[palette_image()]),
    encoded(Image.fromarray(NOISE), "WEBP", lossless=True),
    encoded(Image.fromarray(NOISE), "BMP"),
    encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_lzw"),
    encoded(Image.fromarray(GREY16), "TIFF"),
]
EDIT = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "cut", "insert"]), st.integers(0, 255))


@given(st.sampled_from(VALID), st.lists(EDIT, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's word on damaged metadata
def test_mutated_files_give_an_image_or_an_image_error(data: bytes, edits: list[tuple[float, str, int]]) -> None:
    changed = bytearray(data)
    for place, kind, value in edits:
        start = int(place * len(changed))
        end = start if kind == "insert" else start + 1 + (value // 32 if kind == "cut" else 0)
        changed[start:end] = b"" if kind == "cut" else bytes([value])
    try:
        assert decode(bytes(changed), max_pixels=100_000).mode == "RGB"
    except ImageError as error:
        assert str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry and normalisation

SIDES = (15, 16, 17, 18, 19, 31, 40, 97)
LARGE = [(500, 375), (375, 500), (256, 256), (256, 301), (333, 255), (1000, 130)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("img_size", "resize", "sizes"),
    [
        (16, 18, [(w, h) for w in SIDES for h in SIDES]),
        (15, 18, [(w, h) for w in SIDES for h in SIDES]),
        (16, 17, [(w, h) for w in SIDES for h in SIDES]),
        (17, 17, [(w, h) for w in SIDES for h in SIDES]),
        (224, 256, LARGE),
    ],
)
def test_crop_is_bit_equal_to_torchvision(
    img_size: int, resize: int, sizes: list[tuple[int, int]], interpolation: str
) -> None:
    spec = Preprocessing(img_size=img_size, resize=resize, interpolation=interpolation)
    filter_ = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose([transforms.Resize(resize, filter_), transforms.CenterCrop(img_size)])
    for width, height in sizes:
        image = noise(width, height)
        assert np.array_equal(fit(image, spec), np.asarray(reference(image))), (width, height)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (16, 16), (7, 5), (300, 1)])
def test_squash_is_pillows_resize_to_a_square(size: tuple[int, int]) -> None:
    spec = Preprocessing(img_size=16, resize=16, resize_mode="squash")
    expected = noise(*size).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(fit(noise(*size), spec), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "inner", "left", "top"),
    [
        ((40, 20), (16, 8), 0, 4),
        ((20, 40), (8, 16), 4, 0),
        ((30, 30), (16, 16), 0, 0),
        ((40, 13), (16, 5), 0, 5),
        ((13, 40), (5, 16), 5, 0),
        ((8, 4), (16, 8), 0, 4),
        ((400, 1), (16, 1), 0, 7),
    ],
)
def test_pad_keeps_the_aspect_ratio_and_fills_the_rest(
    size: tuple[int, int], inner: tuple[int, int], left: int, top: int
) -> None:
    spec = Preprocessing(img_size=16, resize=16, resize_mode="pad", interpolation="bicubic", fill=(1, 2, 3))
    expected = np.full((16, 16, 3), (1, 2, 3), np.uint8)
    resized = np.asarray(noise(*size).resize(inner, Image.Resampling.BICUBIC))
    expected[top : top + inner[1], left : left + inner[0]] = resized
    assert np.array_equal(fit(noise(*size), spec), expected)


@pytest.mark.parametrize("size", [(1, 100), (100, 1)])
def test_an_extreme_aspect_ratio_is_refused_before_the_memory_is_taken(size: tuple[int, int]) -> None:
    """The resized image counts: here 18 x 1800 pixels."""
    spec = Preprocessing(img_size=16, resize=18)
    assert fit(Image.new("RGB", size), spec, max_pixels=18 * 1800).shape == (16, 16, 3)
    with pytest.raises(ImageError, match=f"{size[0]}x{size[1]} pixels: too narrow"):
        fit(Image.new("RGB", size), spec, max_pixels=18 * 1800 - 1)
    with pytest.raises(ImageError, match="too narrow"):
        fit(Image.new("RGB", (1, 1000)), Preprocessing())


@pytest.mark.parametrize("values", [{}, CIFAR], ids=["ImageNet", "CIFAR"])
def test_normalise_is_bit_equal_to_torchvision(values: dict[str, Any]) -> None:
    """For every value of every channel."""
    spec = Preprocessing(**values)
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([levels, levels[::-1], levels.T], axis=-1)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    seen = normalise(pixels, spec)
    assert seen.dtype == np.float32
    assert torch.equal(torch.from_numpy(seen).permute(2, 0, 1), reference(pixels))


# ---------------------------------------------------------------------------------------------------------------------
# The stored form


@pytest.mark.parametrize(
    "spec",
    [
        Preprocessing(),
        Preprocessing(img_size=32, resize=36, interpolation="bicubic", **CIFAR),
        Preprocessing(img_size=8, resize=8, resize_mode="pad", fill=(0, 255, 7)),
        Preprocessing(img_size=4096, resize=4096, resize_mode="squash"),
    ],
)
def test_the_stored_form_comes_back_through_json(spec: Preprocessing) -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("key", Preprocessing().to_dict())
def test_a_missing_key_is_refused_by_name(key: str) -> None:
    values = Preprocessing().to_dict()
    del values[key]
    with pytest.raises(ValueError, match=key):
        Preprocessing.from_dict(values)


@pytest.mark.parametrize("key", [*Preprocessing.RULES, "gamma"])
def test_another_rule_and_an_unknown_key_are_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Preprocessing.from_dict({**Preprocessing().to_dict(), key: "some other rule"})


WRONG: dict[str, tuple[Any, ...]] = {
    "img_size": (0, -1, 4097, 257, 224.0, True, "224", None),
    "resize": (223, 0, 4097, None),
    "resize_mode": ("stretch", None, ["crop"], {}),
    "interpolation": ("lanczos", None, ["bilinear"], {}),
    "mean": ([0.5, 0.5], [0.5] * 4, [-0.1, 0, 0], [1.1, 0, 0], [float("nan"), 0, 0], "abc", None, 0.5),
    "std": ([0, 1, 1], [0.5, 0.5], [-1, 1, 1], [float("inf"), 1, 1], None, ["1", "1", "1"]),
    "fill": ([256, 0, 0], [-1, 0, 0], [0.5, 0, 0], [0, 0], None),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_values_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="preprocessing: "):
        Preprocessing.from_dict({**Preprocessing().to_dict(), key: value})


def test_canonical_json_is_one_spelling_of_a_value() -> None:
    assert canonical_json({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"\\u00e9"]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
