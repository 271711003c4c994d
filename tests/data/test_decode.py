"""The faster ways to decode, against Pillow's own pixels: equal, or within a stated bound where asked for."""

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.predict import ImageError, decode
from resnet_dist.data.decode import Reader, jpeg_pixels, jpeg_scale, load_image, load_whole, scaled_jpeg_pixels
from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.errors import DataError

# Smooth, so that a JPEG of it looks like a photograph and not like noise.
SMOOTH = Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((211, 157))


def jpeg(image: Image.Image = SMOOTH, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(exif=exif)


def photographs(shared: Path) -> list[Path]:
    """Every eleventh of both kinds."""
    return sorted(shared.glob("hymenoptera/**/*.jpg"))[::11] + sorted(shared.glob("cats_dogs/**/*.jpg"))[::111]


def one(file: Path) -> ImageTable:
    return ImageTable(file.parent, PathTable([file.name]), np.zeros(1, np.int64))


ORDINARY = {
    "colour": jpeg(),
    "best": jpeg(quality=100, subsampling=0),
    "worst": jpeg(quality=5, subsampling=2),
    "half": jpeg(subsampling=1),
    "progressive": jpeg(progressive=True),
    "grey": jpeg(SMOOTH.convert("L")),
    "odd size": jpeg(SMOOTH.resize((17, 33))),
    "one pixel": jpeg(SMOOTH.resize((1, 1))),
    "upright": turned(1),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_jpeg_pixels_equal_pillow(name: str) -> None:
    pixels = jpeg_pixels(ORDINARY[name])
    assert pixels is not None
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(ORDINARY[name])).convert("RGB")))


def test_photograph_pixels_equal_pillow(shared: Path) -> None:
    files = photographs(shared)
    assert len(files) > 40
    for file in files:
        pixels = jpeg_pixels(file.read_bytes())
        assert np.array_equal(load_whole(one(file), 0), np.asarray(load_image(one(file), 0))), file
        assert pixels is None or np.array_equal(pixels, np.asarray(Image.open(file))), file


@pytest.mark.parametrize("orientation", range(2, 9))
def test_rotated_photographs_are_decoded_by_the_predictor(tmp_path: Path, orientation: int) -> None:
    file = tmp_path / "turned.jpg"
    file.write_bytes(turned(orientation))
    assert jpeg_pixels(file.read_bytes()) is None
    assert np.array_equal(load_whole(one(file), 0), np.asarray(decode(file)))
    assert load_whole(one(file), 0).shape[:2] == ((157, 211) if orientation < 5 else (211, 157))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("CMYK", ".jpg"), ("RGBA", ".png"), ("P", ".png"), ("I;16", ".png"), ("1", ".bmp"), ("L", ".gif")],
)
def test_other_formats_are_decoded_by_the_predictor(tmp_path: Path, mode: str, suffix: str) -> None:
    file = tmp_path / f"other{suffix}"
    grey = np.asarray(SMOOTH.convert("L"), np.uint16)
    (Image.fromarray(grey * 200) if mode == "I;16" else SMOOTH.convert(mode)).save(file)
    assert jpeg_pixels(file.read_bytes()) is None
    assert np.array_equal(load_whole(one(file), 0), np.asarray(decode(file)))


def outcome(data: bytes) -> np.ndarray | str:
    """The pixels of a file in the predictor."""
    try:
        return np.asarray(decode(data))
    except ImageError as error:
        return str(error)


@pytest.mark.filterwarnings("default:.*:UserWarning")  # Pillow's, of odd Exif fields
def test_damaged_files_are_treated_as_by_the_predictor(shared: Path) -> None:
    """Cut short, bytes changed, bytes gone: the same pixels, the same error, or left to its decoder."""
    draw = random.Random(1)
    seen = {"equal": 0, "error": 0, "left": 0}
    for file in photographs(shared)[::6]:
        for _ in range(8):
            data = bytearray(file.read_bytes())
            place = draw.randrange(2, len(data))
            if draw.random() < 0.3:
                del data[place : place + draw.choice((1, 1000, len(data)))]
            else:
                data[place : place + 2] = draw.randbytes(2)
            expected = outcome(bytes(data))
            try:
                pixels = jpeg_pixels(bytes(data))
            except ImageError as error:
                assert str(error) == expected
                seen["error"] += 1
                continue
            assert pixels is None or np.array_equal(pixels, expected), file
            seen["left" if pixels is None else "equal"] += 1
    assert seen["equal"] > 20 and seen["left"] > 5, seen


def test_pipe_or_too_large_file_is_refused_at_once(tmp_path: Path) -> None:
    """Between the look at the header and the reading of the file."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "large.jpg").touch()
    os.truncate(tmp_path / "large.jpg", 1 << 40)
    for name, reason in (("pipe.jpg", "a pipe or a device"), ("large.jpg", "larger than")):
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            load_whole(one(tmp_path / name), 0)


def test_without_torchvisions_decoder_the_pixels_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(jpeg())
    expected = load_whole(one(file), 0)
    monkeypatch.setattr("resnet_dist.data.decode.DECODE_JPEG", None)
    assert jpeg_pixels(file.read_bytes()) is None
    assert np.array_equal(load_whole(one(file), 0), expected)


# Scaled decoding


@pytest.mark.parametrize(
    ("size", "least", "scale"),
    [((400, 300), 150, 2), ((300, 400), 151, 1), ((4000, 3000), 448, 4), ((9999, 9000), 448, 8), ((80, 60), 448, 1)],
)
def test_scaled_short_side_is_not_below_the_minimum(size: tuple[int, int], least: int, scale: int) -> None:
    assert jpeg_scale(size, least) == scale


def test_scaled_photographs_equal_pixel_means(shared: Path) -> None:
    """Within 1.5 levels of 255 on average of what averaging squares of 2x2, 4x4, 8x8 pixels gives."""
    seen = set()
    for file in photographs(shared)[::3]:
        whole = load_whole(one(file), 0)
        for scale in (2, 4, 8):
            pixels = load_whole(one(file), 0, least=min(whole.shape[:2]) // scale)
            assert pixels.shape[:2] == tuple(-(-side // scale) for side in whole.shape[:2])
            height, width = (side // scale for side in whole.shape[:2])
            squares = whole[: height * scale, : width * scale].reshape(height, scale, width, scale, 3)
            difference = np.abs(pixels[:height, :width] - squares.mean(axis=(1, 3)))
            assert difference.mean() < 1.5, (file, scale)
            seen.add(scale)
    assert seen == {2, 4, 8}


def test_scaled_photographs_are_rotated_and_small_ones_not_scaled(tmp_path: Path) -> None:
    file = tmp_path / "turned.jpg"
    file.write_bytes(turned(6))
    assert load_whole(one(file), 0, least=70).shape == (106, 79, 3)
    assert np.array_equal(load_whole(one(file), 0, least=80), load_whole(one(file), 0))
    SMOOTH.save(tmp_path / "a.png")
    assert scaled_jpeg_pixels((tmp_path / "a.png").read_bytes(), 10) is None
    assert Reader(one(tmp_path / "a.png"), None, least=10)(0).shape == (157, 211, 3)
