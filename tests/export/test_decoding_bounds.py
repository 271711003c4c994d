"""Small files that ask for much: what decoding takes in time and memory is bounded before it begins."""

import hashlib
import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import predict
from export.predict import ImageError, Preprocessing, Room, decode, fit, memory_of, opened, to_rgb
from resnet_dist.data.check import difference_hash, look
from resnet_dist.data.decode import load_fitted, load_whole
from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_of_scans(scans: int, side: int = 64, progressive: bool = True) -> bytes:
    """A grey JPEG whose scans but the first hold no data at all: a decoder goes over every block all the same."""
    table = bytes([1] + [0] * 15)  # one code, of one bit
    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"
    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2 if progressive else 0xC0, frame)
    head += segment(0xC4, b"\0" + table + b"\0") + segment(0xC4, b"\x10" + table + b"\0")
    first = segment(0xDA, b"\1\1\0\0\0\0" if progressive else b"\1\1\0\0\x3f\0")
    return head + first + bytes(side * side // 256) + segment(0xDA, b"\1\1\0\1\x3f\0") * (scans - 1) + b"\xff\xd9"


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(chunk: bytes, count: int) -> bytes:
    """A sound PNG with a chunk that is repeated after its header."""
    data = encoded(Image.new("L", (8, 8)), "PNG")
    return data[:33] + chunk * count + data[33:]


def tiff(width: int, height: int, bits: int, data: bytes, strips: int = 1, photometric: int = 1) -> bytes:
    """A grey uncompressed TIFF; its strips, if several, are all at one place."""
    place = 8 + 2 + 12 * 9 + 4
    one = strips == 1
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 4, 1, bits), (259, 4, 1, 1), (262, 4, 1, photometric)]
    tags += [(273, 4, strips, place), (277, 4, 1, 1), (278, 4, 1, height // strips)]
    tags += [(279, 4, strips, len(data) if one else place + 4 * strips)]
    packed = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + packed + bytes(4) + (data if one else bytes(8 * strips))


def rle_bmp(side: int) -> bytes:
    """A BMP of empty run-length coded rows: two bytes for each."""
    head = struct.pack("<LllHHLLllLL", 40, side, side, 1, 8, 1, 2 * side, 0, 0, 256, 0)
    return b"BM" + struct.pack("<LHHL", 1078 + 2 * side, 0, 0, 1078) + head + bytes(1024) + bytes(2 * side) + b"\0\1"


PROFILE = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1000)))
BUSY = {
    "scans": (jpeg_of_scans(101), "100 scans"),
    "scans after much else": (
        jpeg_of_scans(101).replace(b"\xff\xdb", segment(0xFE, bytes(60_000)) + b"\xff\xdb"),
        "100",
    ),
    "segments": (b"\xff\xd8" + segment(0xFE, b"") * 5000 + jpeg_of_scans(2)[2:], "segments"),
    "bytes between segments": (b"\xff\xd8" + b"\xff" * 200_000 + jpeg_of_scans(1)[2:], "between"),
    "chunks": (png_with(png_chunk(b"IDAT", b""), 5000), "chunks"),
    "profiles": (png_with(PROFILE, 2), "profiles"),
    "strips": (tiff(1, 5000, 8, b"", strips=5000), "5000 strips"),
    "comments": (b"P1\n64 64\n" + b"#\n" * 5000, "comments"),
    "runs": (rle_bmp(5000), "slow encoding"),
}


@pytest.mark.parametrize("name", BUSY)
def test_files_that_keep_a_decoder_busy_are_refused_at_once(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bytes, as a file, and in every way that training and check read one."""
    monkeypatch.setattr(predict, "MAX_PARTS", 4000)
    data, reason = BUSY[name]
    (tmp_path / "x.jpg").write_bytes(data)
    table = ImageTable(tmp_path, PathTable(["x.jpg"]), np.zeros(1, np.int64))
    started = time.process_time()
    for source in (data, tmp_path / "x.jpg"):
        with pytest.raises(ImageError, match=reason):
            decode(source)
    for load in (lambda: load_whole(table, 0), lambda: load_whole(table, 0, 1), lambda: load_fitted(table, 0, SPEC)):
        with pytest.raises(DataError, match=reason):
            load()
    assert reason in look(tmp_path, "x.jpg", "", "train", full=True).error
    assert time.process_time() - started < 5


SPEC = Preprocessing(img_size=16, resize=16)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_within_the_limits_are_decoded() -> None:
    """Files at the limits, and a JPEG with markers of scans in its comments and trailing bytes."""
    assert decode(jpeg_of_scans(100)).size == (64, 64)
    photo = Image.fromarray(NOISE[..., :3])
    for options in ({}, {"progressive": True}, {"progressive": True, "subsampling": 0, "restart_marker_blocks": 1}):
        plain = encoded(photo, "JPEG", **options)
        markers = segment(0xE5, b"\xff\xda\0\x08" * 500)
        data = plain[:2] + markers + plain[2:] + b"\xff\xda" * 500
        assert np.array_equal(decode(data), Image.open(io.BytesIO(plain)))
    assert decode(png_with(png_chunk(b"tEXt", b"a\0b"), 500)).size == (8, 8)
    assert decode(png_with(PROFILE, 1)).size == (8, 8)
    assert decode(tiff(1, 500, 8, b"", strips=500)).size == (1, 500)
    assert decode(b"P1\n" + b"#\n" * 50 + b"2 1\n0 1\n").size == (2, 1)


def test_single_scan_sequential_files_are_read_no_further(tmp_path: Path) -> None:
    """A decoder stops there too: what follows costs nothing, so that it need not be read."""
    assert decode(jpeg_of_scans(1, progressive=False)).size == (64, 64)
    started = time.process_time()
    with pytest.raises(ImageError, match="damaged"):
        decode(jpeg_of_scans(100_000, progressive=False))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("size", [(1, 60_000), (2, 60_000)])
def test_narrow_images_are_refused_in_every_mode_before_memory_is_taken(size: tuple[int, int]) -> None:
    """Squashing resizes the width first: here to 16 x 60000 pixels."""
    spec = Preprocessing(img_size=16, resize=16, resize_mode="squash")
    assert fit(Image.new("RGB", size), spec, max_pixels=16 * 60_000).shape == (16, 16, 3)
    with pytest.raises(ImageError, match="too narrow"):
        fit(Image.new("RGB", size), spec, max_pixels=16 * 60_000 - 1)


# Memory


def test_threads_share_the_room() -> None:
    """No more is taken than there is, unless one image alone is larger: that one waits for all others."""
    room, lock, held, seen = Room(100), threading.Lock(), [0], []

    def take(size: int) -> None:
        with room.take(size):
            with lock:
                held[0] += size
                seen.append(held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= size

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [30, 60, 5, 250, 40, 90, 10, 30] * 5))
    assert len(seen) == 40 and held == [0]
    assert all(taken <= 100 or taken == 250 for taken in seen)
    assert max(taken for taken in seen if taken <= 100) > 60, "threads were to run side by side"


def test_room_is_given_back_after_a_damaged_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "ROOM", Room(10_000))
    data = encoded(Image.fromarray(NOISE[..., :3]), "PNG")
    for _ in range(3):
        with pytest.raises(ImageError):
            decode(data[:-200])
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(decode, [data] * 12))) == 12


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF"])
def test_a_check_of_every_pixel_decodes_once_and_within_the_room(
    name: str, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    file = tmp_path / f"a.{name.lower()}"
    file.write_bytes(encoded(Image.fromarray(NOISE[..., :3]), name, exif=exif))
    with opened(file) as image:
        kind, needed = type(image), memory_of(image)
    room, load, taken = predict.ROOM, kind.load, list[int]()

    def counted(self: Any) -> Any:
        if self.tile:
            taken.append(room._taken)
        return load(self)

    monkeypatch.setattr(kind, "load", counted)
    found = look(tmp_path, file.name, "x", "train", full=True)
    assert taken == [needed] and room._taken == 0
    assert found.rotated == turned and not found.error
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.dhash == difference_hash(decode(file))
    assert found.identity == (file.stat().st_dev, file.stat().st_ino)


# In a process of its own: one that has kept freed memory decodes into that, and its peak does not rise.
TAKEN = """
import sys
from pathlib import Path
from export.predict import decode, memory_of, opened

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

data = Path(sys.argv[1]).read_bytes()
with opened(data) as image:
    most = memory_of(image)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = memory("VmRSS")
decode(data)
print((memory("VmHWM") - before) / most)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("I;16", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ("RGB", "WEBP", {"quality": 10, "method": 0}),
        ("RGB", "TIFF", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_estimate_from_the_header_covers_what_decoding_takes(
    mode: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """9 megapixels, turned by their Exif."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "large"
    file.write_bytes(encoded(Image.new(mode, (3000, 3000)), name, exif=exif, **options))
    command = [sys.executable, "-c", TAKEN, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert 0.2 < float(done.stdout) < 1.05


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "I;16"])
def test_large_images_are_converted_in_bands_to_the_same_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    colour = Image.fromarray(NOISE)
    image = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 250) if mode == "I;16" else colour.convert(mode)
    if mode in ("P", "L", "I;16"):
        image.info["transparency"] = int(np.asarray(image)[5, 5])
    whole = np.asarray(to_rgb(image))
    monkeypatch.setattr(predict, "BAND", 7 * image.width)
    assert np.array_equal(to_rgb(image), whole)
    assert len(np.unique(whole)) > 10


# Bit depth


def test_twelve_bit_grey_is_scaled_by_its_depth() -> None:
    values = np.array([[0, 8, 9, 2048], [4095, 4086, 1000, 16]])
    bits = "".join(f"{value:012b}" for value in values.ravel().tolist())
    data = tiff(4, 2, 12, int(bits, 2).to_bytes(12, "big"))
    assert np.asarray(Image.open(io.BytesIO(data))).tolist() == values.tolist()
    assert np.asarray(decode(data))[..., 0].tolist() == np.rint(values / 4095 * 255).astype(int).tolist()


@pytest.mark.parametrize("bits", range(9, 16))
def test_other_depths_are_scaled_or_refused(bits: int) -> None:
    """All bits set is white in every depth; what cannot be read says so."""
    try:
        pixels = np.asarray(decode(tiff(8, 2, bits, b"\xff" * 2 * bits)))
    except ImageError as error:
        assert "not an image in a supported format" in str(error)
    else:
        assert (pixels == 255).all()


def test_sixteen_bit_grey_that_is_inverted_is_refused() -> None:
    with pytest.raises(ImageError, match="0 is white"):
        decode(tiff(2, 1, 16, bytes(4), photometric=0))
