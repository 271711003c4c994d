"""Predict the classes of images with an exported ONNX model. Needs only numpy, Pillow and onnxruntime.

    python predict.py model.onnx photos/ more.jpg --top-k 3
    python predict.py model.onnx photos/ --sort-into sorted/
    python predict.py model.onnx --verify --images validation_photos/

As a library: `Predictor("model.onnx").predict(["cat.jpg"])`. The metadata of the model file holds its classes and its
preprocessing. Every export includes a copy of this file, so it imports nothing from resnet-dist. Training and
evaluation import their decoding, resizing and cropping from here, so a deployed model gets the same pixels as they do.
"""

import argparse
import codecs
import csv
import dataclasses
import errno
import filecmp
import glob
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn, TextIO

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

# Formats that are decoded, recognised by content and not by file name. EPS, PDF and similar formats are excluded for
# security: Pillow passes them to external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 1 << 29  # more than twice the size of MAX_PIXELS uncompressed RGB pixels
# Limits on the work that a small file can cause: scans (libtiff has the same limit); strips, tiles, chunks or
# segments; pixels for codecs written in Python; comments in a plain PNM; bytes in which the header is expected.
MAX_SCANS, MAX_PARTS, MAX_SLOW_PIXELS, MAX_COMMENTS, HEAD = 100, 1 << 16, 1 << 24, 1000, 1 << 14
SLOW_CODECS = ("bmp_rle", "ppm_plain")
MIN_ROOM, ROOM_PER_CORE = 1 << 29, 1 << 27  # bytes that all threads together may use for decoding
BAND = 1 << 20  # pixels converted at a time
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a JPEG marker that ends the data of a scan
ORIENTATION, PHOTOMETRIC, BITS_PER_SAMPLE = 0x0112, 262, 258  # Exif and TIFF fields
TURNS = dict(enumerate((None, *(Image.Transpose(t) for t in (0, 3, 1, 5, 4, 6, 2))), 1))  # by Exif orientation
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

OpenFile = io.BufferedReader | io.BytesIO
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# Exceptions that Pillow's decoders raise on damaged files.
_ODD = (SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, struct.error)
DAMAGED = (*_ODD, OSError, ValueError, MemoryError)

# A file that unpacks to hundreds of megapixels is an attack or an accident, so Pillow's warning becomes an error.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image cannot be used: it is unreadable, or its format or size is not accepted. One line, without the path."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image file is converted to the network's input. Checkpoints and exported models store it unchanged.

    These rules are fixed and are part of the stored form: EXIF orientation is applied; alpha is composited on white;
    16-bit grey is scaled to 8 bits; Pillow resizes uint8 pixels with antialiasing; in mode `crop` the long side becomes
    `int(resize * long / short)`; the crop starts at `round((size - img_size) / 2)`, where halves round to even.

    Attributes:
        img_size: side of the square result in pixels.
        resize_mode: "crop" (resize the short side to `resize`, then crop the centre), "squash" (ignore the aspect
            ratio) or "pad" (resize the long side to `img_size`, then pad with `fill`).
        resize: short side before the crop in pixels; equals `img_size` in the other modes.
        interpolation: "bilinear" or "bicubic".
        mean, std: one value per channel, in 0..1.
        fill: RGB colour of the padding, 0..255.
    """

    img_size: int = 224
    resize_mode: str = "crop"
    resize: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    fill: tuple[int, int, int] = (124, 116, 104)

    RULES: ClassVar[Mapping[str, str]] = {
        "color": "RGB",
        "exif": "transpose",
        "alpha": "composite on white",
        "sixteen_bit": "divide by 257",
        "resize_library": "Pillow, uint8, antialias",
        "resize_rounding": "int(resize * long / short)",
        "crop_rounding": "round half to even",
        "scale": "1/255",
    }

    def to_dict(self) -> dict[str, Any]:
        """The fields and the fixed rules as plain JSON values."""
        fields = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {**fields, **self.RULES}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Read the stored form.

        Raises ValueError if a key is missing or unknown, if a rule differs from `RULES`, or if a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError("preprocessing must be an object")
        wrong = [
            f"{name} must be {rule!r}, not {values.get(name)!r}"
            for name, rule in cls.RULES.items()
            if values.get(name) != rule
        ]
        names = {field.name for field in dataclasses.fields(cls)}
        wrong += [f"{name} is missing" for name in names - set(values)]
        wrong += [f"unknown {name}" for name in set(values) - names - set(cls.RULES)]
        if wrong:
            raise ValueError("preprocessing: " + "; ".join(sorted(wrong)))
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v := values[name], list) else v for name in names}
        spec = cls(**fields)
        spec._check()
        return spec

    def _check(self) -> None:
        sizes_fit = all(type(n) is int and 1 <= n <= 4096 for n in (self.img_size, self.resize))
        if not sizes_fit or (self.resize_mode == "crop" and self.resize < self.img_size):
            raise ValueError(
                f"preprocessing: img_size {self.img_size!r} and resize {self.resize!r} must be in 1..4096, and in mode "
                "crop resize must not be below img_size"
            )
        if self.resize_mode not in ("crop", "squash", "pad") or self.interpolation not in tuple(FILTERS):
            raise ValueError(
                f"preprocessing: unknown resize_mode {self.resize_mode!r} or interpolation {self.interpolation!r}"
            )
        for name in ("mean", "std", "fill"):
            values = getattr(self, name)
            limit = 255 if name == "fill" else 1
            kind = int if name == "fill" else int | float
            fits = isinstance(values, tuple) and len(values) == 3 and all(isinstance(v, kind) for v in values)
            if not fits or not all(0 <= v <= limit for v in values):
                raise ValueError(f"preprocessing: {name} must be three numbers in 0..{limit}, not {values!r}")
        if min(self.std) <= 0:
            raise ValueError("preprocessing: std must be above 0")


class Room:
    """Memory for decoding, shared by all threads. A thread waits until its image fits or nothing else is decoded."""

    def __init__(self, size: int) -> None:
        self._size, self._taken, self._changed = size, 0, threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes inside this context. A thread may hold only one reservation at a time."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._size)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


ROOM = Room(max(MIN_ROOM, ROOM_PER_CORE * (os.cpu_count() or 1)))


def decode(source: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file, or its bytes, to an upright RGB image. Of an animation, only the first frame is decoded.

    Raises ImageError if the image cannot be used, before decoding if the header already shows it, and OSError if the
    file cannot be opened.
    """
    with decoded(source, max_pixels) as image:
        return image


@contextmanager
def decoded(source: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Like `decode`, as a context that reserves the memory of the image in the budget of all threads (`ROOM`)."""
    with opened(source, max_pixels, whole=True) as image, ROOM.take(memory_of(image)):
        yield loaded(image)


def loaded(image: Image.Image) -> Image.Image:
    """Decode an opened image to upright RGB. The caller must reserve its memory."""
    bits = bits_of(image)
    image.load()
    return to_rgb(upright(image), bits)


@contextmanager
def opened(
    source: str | os.PathLike[str] | bytes | OpenFile, max_pixels: int = MAX_PIXELS, whole: bool = False
) -> Iterator[Image.Image]:
    """Open an image and check its header. Errors in the check or inside this context are raised as ImageError.

    With `whole`, and always for bytes, the structure of the whole file is checked, otherwise that of its start.
    """
    with file_of(source) as file, as_image_errors(max_pixels):
        _check_structure(file, whole or isinstance(source, bytes))
        with Image.open(file, formats=FORMATS) as image:
            pixels, parts = image.width * image.height, getattr(image, "tile", ())
            if pixels > max_pixels:
                raise ImageError(f"{image.width}x{image.height} pixels, more than the limit of {max_pixels}")
            if len(parts) > MAX_PARTS:
                raise ImageError(f"{len(parts)} strips or tiles, more than the limit of {MAX_PARTS}")
            if parts and parts[0][0] in SLOW_CODECS and pixels > MAX_SLOW_PIXELS:
                raise ImageError(
                    f"{pixels} pixels in a slow encoding, whose limit is {MAX_SLOW_PIXELS}: save it as PNG"
                )
            yield image


@contextmanager
def file_of(source: str | os.PathLike[str] | bytes | OpenFile) -> Iterator[OpenFile]:
    """Open a file; one that is already open stays open. Raises OSError, or ImageError if it is no file or too large."""
    if isinstance(source, OpenFile | bytes):
        yield io.BytesIO(source) if isinstance(source, bytes) else source
        return
    try:
        status = os.stat(source)  # noqa: PTH116 - it raises ValueError only for a name that contains a NUL
    except ValueError as error:
        raise ImageError(f"not a file name ({error})") from None
    if stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):  # opening a pipe can block forever
        raise ImageError("a pipe or a device, not a file")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    with Path(source).open("rb") as file:
        yield file


@contextmanager
def as_image_errors(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Inside this context, exceptions of Pillow's decoders become an ImageError."""
    try:
        yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(f"more pixels than the limit of {max_pixels}") from None
    except UnidentifiedImageError:
        raise ImageError(f"not an image in a supported format ({', '.join(FORMATS)})") from None
    except ImageError:
        raise
    except DAMAGED as error:
        raise ImageError(f"damaged or truncated ({error})") from None


def _check_structure(file: BinaryIO, whole: bool) -> None:
    """Refuse a file that is very slow to decode for its size, then rewind it. Raises ImageError.

    Without `whole`, only the first bytes are checked: Pillow reads little more than those for the header.
    """
    start = file.read(HEAD)
    check = next((check for magic, check in STRUCTURE.items() if start.startswith(magic)), None)
    if check is not None and not check(start) and whole:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with ROOM.take(size):
            check(file.read(size))
    file.seek(0)


def _check_jpeg(data: bytes) -> bool:
    """Limit the scans of a JPEG. The decoder visits all pixels in every scan, and 10,000 scans fit into 1 MB.

    Returns whether it is an ordinary JPEG with one scan. Raises ImageError.
    """
    place, scans, segments, components, sequential = 2, 0, 0, 0, False
    while (match := MARKER.search(data, place)) and (marker := data[match.start() + 1]) != 0xD9:
        gap, place = match.start() - place, match.end()
        if marker in (0x01, 0xD8) or place + 8 > len(data):
            continue
        segments += 1
        if marker == 0xDA:
            scans += 1
            if sequential and data[place + 2] == components:  # a decoder reads no other scan
                return True
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            sequential, components = marker in (0xC0, 0xC1, 0xC9), data[place + 7]
        if scans > MAX_SCANS:
            raise ImageError(f"a JPEG with more than {MAX_SCANS} scans, which would take too long: save it again")
        if segments > MAX_PARTS or (not scans and gap > HEAD):
            raise ImageError("a JPEG with too many segments, or too much data between them: save it again")
        place += int.from_bytes(data[place : place + 2], "big")
    return False


def _check_png(data: bytes) -> bool:
    place, chunks, profiles = 8, 0, 0
    while place + 8 <= len(data):
        chunks += 1
        profiles += data[place + 4 : place + 8] == b"iCCP"
        if chunks > MAX_PARTS or profiles > 1:
            raise ImageError("a PNG with too many chunks or colour profiles: save it again")
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return False


def _check_plain(data: bytes) -> bool:
    if data.count(b"#") > MAX_COMMENTS:
        raise ImageError(f"a PNM with more than {MAX_COMMENTS} comments: save it again")
    return False


STRUCTURE: dict[bytes, Callable[[bytes], bool]] = {b"\xff\xd8": _check_jpeg, b"\x89PNG": _check_png}
STRUCTURE |= dict.fromkeys((b"P1", b"P2", b"P3"), _check_plain)


def memory_of(image: Image.Image) -> int:
    """The most bytes that decoding and resizing an opened image can take, estimated from its header."""
    pixels = image.width * image.height
    bytes_per_pixel = 8  # Pillow stores RGB in four bytes, and turning the image upright copies it
    if image.format in ("WEBP", "TIFF") or image.info.get("progressive"):
        bytes_per_pixel = 20  # frame buffers, one strip for the whole image, DCT coefficients
    elif image.mode not in ("RGB", "L"):
        bytes_per_pixel = 12  # plus a third copy as RGB
    short, long = sorted(image.size)
    return bytes_per_pixel * pixels + 20 * min(pixels, BAND) + (1 << 20) * -(-long // max(short, 1))


def bits_of(image: Image.Image) -> int:
    """The bits per pixel of an opened grey image that is stored in 16 bits, such as 12. Raises ImageError."""
    tags = getattr(image, "tag_v2", {}) if image.mode.startswith("I;16") else {}
    if tags.get(PHOTOMETRIC) == 0:
        raise ImageError("16-bit grey in which 0 is white is not supported: convert it to 8 bits first")
    return int(tags.get(BITS_PER_SAMPLE, (16,))[0])


def upright(image: Image.Image) -> Image.Image:
    """Rotate or mirror the image as its Exif orientation says."""
    # Not ImageOps.exif_transpose: it rewrites all Exif fields, and fails if one of them is malformed.
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, bits: int = 16) -> Image.Image:
    """Convert an image of any mode to RGB: alpha is composited on white, grey of up to 16 `bits` is scaled to 8 bits.

    Raises ImageError if the range of the pixel values is unknown.
    """
    if image.mode == "F":
        raise ImageError("the range of its floating-point pixels is unknown: convert it to 8 bits first")
    if image.mode.startswith("I"):
        return _in_bands(image, partial(_scaled_to_8_bit, most=2**bits - 1))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _in_bands(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_bands(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Apply `change`, which returns RGB. A large image is converted a few rows at a time to save memory."""
    rows = max(1, BAND // max(1, image.width))
    if image.height <= rows:
        return change(image)
    changed = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        changed.paste(change(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return changed


def _on_white(image: Image.Image) -> Image.Image:
    upper = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")


def _scaled_to_8_bit(image: Image.Image, most: int) -> Image.Image:
    values = np.asarray(image).astype(np.int32)
    if values.size and (values.min() < 0 or values.max() > most):
        raise ImageError("the range of its 32-bit pixels is unknown: convert it to 8 bits first")
    scaled = ((values * 255 + most // 2) // most).astype(np.uint8)
    scaled[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(scaled, "L").convert("RGB")


def fit(image: Image.Image, spec: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Resize and crop an RGB image for evaluation. Returns uint8 (img_size, img_size, 3).

    Raises ImageError if the aspect ratio is so extreme that the resized image would exceed `max_pixels`.
    """
    size, filter_ = spec.img_size, FILTERS[spec.interpolation]
    width, height = image.size
    if spec.resize_mode == "crop":
        short, long = sorted(image.size)
        longer = long if short == spec.resize else int(spec.resize * long / short)
        inner = (spec.resize, longer) if width <= height else (longer, spec.resize)
    elif spec.resize_mode == "pad":
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    else:
        inner = (size, size)
    if inner[0] * max(inner[1], height) > max(max_pixels, width * height):  # Pillow resizes the width first
        raise ImageError(f"{width}x{height} pixels: too narrow, resizing it would exceed the pixel limit")
    image = image if image.size == inner else image.resize(inner, filter_)
    if spec.resize_mode == "pad":
        canvas = Image.new("RGB", (size, size), spec.fill)
        canvas.paste(image, ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return np.asarray(canvas)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def normalise(pixels: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """Normalise uint8 (..., 3) to float32: (x / 255 - mean) / std, by a lookup table of 256 values per channel."""
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = (levels - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.stack([table[pixels[..., channel], channel] for channel in range(3)], axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Which files are images: predict, train and check follow this one rule

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
EXTENSIONS |= {".ppm", ".pgm", ".pbm", ".pnm"}
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".mts"}
NOT_DATA = {"__macosx", "thumbs.db", "desktop.ini"}


def images_below(
    folder: Path, ignored: Counter[str], notes: list[str], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Yield the image files below a folder, sorted. They are recognised by extension; links are followed.

    `ignored` counts the other files by extension, without hidden files and files that file managers leave behind. A
    link to a folder above it is not followed but added to `notes`. Raises OSError if a folder cannot be listed.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        notes.append(f"WARNING: {folder} is a link to a folder above it: not followed")
        return
    folders: list[str] = []
    for entry in entries_of(folder):
        extension = Path(entry.name).suffix.lower()
        if is_folder(entry):
            folders.append(entry.path)
        elif extension in EXTENSIONS and (entry.is_symlink() or entry.is_file()):  # not a pipe
            yield entry.path
        else:
            ignored[extension] += 1
    for path in folders:
        yield from images_below(Path(path), ignored, notes, above | {here})


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """The sorted entries of a folder, without hidden files and those that file managers create. Raises OSError."""
    with os.scandir(folder) as entries:
        visible = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in NOT_DATA]
    return sorted(visible, key=lambda entry: entry.name)


def ignored_text(ignored: Counter[str]) -> str:
    """The text ` (files that are not read as images: 2 .gif, 1 .txt)`, or an empty string."""
    kinds = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in sorted(ignored.items()))
    return f" (files that are not read as images: {kinds})" if kinds else ""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------
# The model


NAMES = "resnet_dist_names"  # name of the error handler that writes any file name to a stream
METADATA, DIGEST = "resnet_dist", "resnet_dist_sha256"
MAX_MODEL_BYTES, MAX_METADATA_BYTES, MAX_CLASSES = 1 << 30, 1 << 24, 100_000
# By their short names; "auto" takes those that start here, in this order.
PROVIDERS = {"cuda": "CUDAExecutionProvider", "openvino": "OpenVINOExecutionProvider", "cpu": "CPUExecutionProvider"}
SHORT = {name: short for short, name in PROVIDERS.items()}
# onnxruntime's default on NVIDIA GPUs since Ampere is TF32, which rounds the factors of every product to 10 bits. That
# is too coarse for logits within 1e-4 of PyTorch's.
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
# The largest error of the self-test's logits, relative to the largest logit: machines add in different orders, and int8
# products may saturate on CPUs without VNNI.
SELF_TEST_TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "int8": 0.25}
GATE = "gate.json"  # next to the model: the images of the gate as sha256 of file and pixels, with PyTorch's logits
LOGITS_TOLERANCE = 1e-4  # of float32, relative to the largest logit of an image, or to 1 if that is more
Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | BinaryIO
Row = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # logits, probabilities and, if wanted, features of an image


class ModelError(ValueError):
    """A model file is missing, damaged or not from resnet-dist. One line that names the file."""

    exit_code = 6


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        source: the path, or "image" if the image was not given as a path.
        classes: the names of the most probable classes, best first; empty if there is an error.
        probabilities: their probabilities (0..1).
        error: why the image cannot be used, or "".
        abstained: whether the best probability is below the confidence threshold.
        features: the input of the head, float32 (F,), if `embed` was set.
    """

    source: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""
    abstained: bool = False
    features: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain JSON values: a line of `--format jsonl`, and the answer of `resnet-dist serve`."""
        best = [{"class": c, "p": p} for c, p in zip(self.classes, self.probabilities, strict=True)]
        line = {"path": self.source, "predictions": best, "abstained": self.abstained}
        return line | {"error": self.error or None}


class Predictor:
    """An exported model that predicts the classes of images.

    Attributes:
        classes: the class names in the order of the logits.
        preprocessing: how an image is converted to the input.
        metadata: the metadata of the file.
        thresholds: the confidence threshold of every class, None if the class is never predicted; empty if the model
            has no thresholds.
        has_features: whether the model was exported with --embeddings.
        provider: the short name of the onnxruntime provider that computes, such as "cpu".
        verified_with: the providers with which the export was verified.
    """

    def __init__(self, model: str | os.PathLike[str], threads: int | None = None, providers: str = "auto") -> None:
        """Load a .onnx file that resnet-dist exported, or the model of an exported run folder.

        `threads`: the number of CPU threads (default: onnxruntime decides). `providers`: "auto", or names such as
        "cuda,cpu". Raises ModelError if the file is missing, damaged, not from resnet-dist, or does not match its
        checksum, or if a provider does not start here, and ValueError if `threads` is below 1.
        """
        if threads is not None:
            _check_count("threads", threads)
        self.path = find_model(model)
        self._session = open_session(_checked(self.path), threads, providers, str(self.path))
        properties = self._session.get_modelmeta().custom_metadata_map
        self.metadata = _read_metadata(self.path, properties.get(METADATA, ""))
        self.classes: tuple[str, ...] = tuple(self.metadata["classes"])
        self.preprocessing = Preprocessing.from_dict(self.metadata["preprocessing"])
        self.thresholds: tuple[float | None, ...] = tuple(self.metadata.get("thresholds", ()))
        self.has_features = any(output.name == "features" for output in self._session.get_outputs())
        self.threads = threads or os.cpu_count() or 1
        self.providers: list[str] = self._session.get_providers()
        self.provider = SHORT.get(self.providers[0], self.providers[0])
        self.verified_with: tuple[str, ...] = tuple(self.metadata.get("verified_with", ["cpu"]))
        self._takes_pixels = self._session.get_inputs()[0].type == "tensor(uint8)"

    @property
    def warning(self) -> str:
        """A line if the export was not verified with the provider that computes here, otherwise ""."""
        if self.provider in self.verified_with:
            return ""
        verified = ", ".join(self.verified_with)
        return f"WARNING: this runs with {self.provider}; {self.path} was verified with {verified} only"

    def inputs(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The feed of the graph for uint8 (B, img_size, img_size, 3): the same, or normalised float32 (B, 3, H, W)."""
        if self._takes_pixels:
            return {"image": pixels}
        return {"pixel_values": np.ascontiguousarray(normalise(pixels, self.preprocessing).transpose(0, 3, 1, 2))}

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (B, img_size, img_size, 3) to float32 (B, classes)."""
        return np.asarray(self._session.run(["logits"], self.inputs(pixels))[0], np.float32)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (B, img_size, img_size, 3) to the input of the head, float32 (B, F). Only if `has_features`."""
        return np.asarray(self._session.run(["features"], self.inputs(pixels))[0], np.float32)

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (B, img_size, img_size, 3) to calibrated probabilities, float32 (B, classes). Each row sums to 1."""
        return self._softmax(self.logits(pixels))

    def _softmax(self, logits: np.ndarray) -> np.ndarray:
        logits = logits / np.float32(self.metadata["temperature"])
        values = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(values / values.sum(axis=1, keepdims=True))

    def predict(
        self,
        images: Source | Iterable[Source],
        top_k: int = 5,
        batch_size: int = 16,
        abstain_below: float | None = None,
        embed: bool = False,
    ) -> Iterator[Prediction]:
        """Yield one prediction per image, in order. An image that cannot be read gives a prediction with `error`.

        `images`: one image, or an iterable of images. An image is a path, the bytes of a file, a binary file object, a
        Pillow image, or a uint8 array (H, W, 3) in RGB or (H, W). `abstain_below` (0..1) replaces the model's
        confidence thresholds. `embed` adds the features. Threads decode the next images while the model runs.

        Raises TypeError at the first item that is not an image; ValueError if `top_k` or `batch_size` is below 1 or
        `abstain_below` is not in 0..1; ModelError if `embed` is set and the model has no features.
        """
        for name, number in (("top_k", top_k), ("batch_size", batch_size)):
            _check_count(name, number)
        if abstain_below is not None and not 0 <= abstain_below <= 1:
            raise ValueError(f"abstain_below must be in 0..1, not {abstain_below!r}")
        if embed and not self.has_features:
            raise ModelError(f"{self.path}: the model has no features; export it with --embeddings")
        items: Any = [images] if _is_one(images) else images
        if not isinstance(items, Iterable):
            raise TypeError(_not_an_image(images))
        return self._predictions(items, top_k, batch_size, abstain_below, embed)

    def _predictions(
        self, images: Iterable[Source], top_k: int, batch_size: int, abstain_below: float | None, embed: bool
    ) -> Iterator[Prediction]:
        for batch in _batched(self._decoded(images, ahead=2 * batch_size + self.threads), batch_size):
            pixels = [array for _, array, _ in batch if array is not None]
            rows = self.rows(np.stack(pixels), embed) if pixels else iter(())
            for name, array, error in batch:
                bad = Prediction(name, error=error)
                yield bad if array is None else self.best(name, next(rows), top_k, abstain_below)

    def rows(self, pixels: np.ndarray, embed: bool = False) -> Iterator[Row]:
        """uint8 (B, img_size, img_size, 3) to the logits, probabilities and features of each image."""
        names = ["logits", "features"] if embed else ["logits"]
        logits, *features = self._session.run(names, self.inputs(pixels))
        return zip(logits, self._softmax(logits), features[0] if embed else [None] * len(logits), strict=True)

    def best(self, name: str, row: Row, top_k: int, abstain_below: float | None = None) -> Prediction:
        """The prediction for one image of `rows`; for the settings see `predict`."""
        logits, probabilities, features = row
        # Sorted by logits, because rounding can make probabilities equal.
        best = np.argsort(-logits, kind="stable")[:top_k]
        values = tuple(float(probabilities[i]) for i in best)
        limit = self.thresholds[best[0]] if abstain_below is None and self.thresholds else abstain_below or 0.0
        abstained = limit is None or values[0] < limit
        return Prediction(name, tuple(self.classes[i] for i in best), values, "", abstained, features)

    def _decoded(self, images: Iterable[Source], ahead: int) -> Iterator[tuple[str, np.ndarray | None, str]]:
        """Yield (name, pixels or None, error) in order, while up to `ahead` more images are decoded."""
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[Future[tuple[str, np.ndarray | None, str]]] = deque()
            for image in images:
                waiting.append(pool.submit(self.load, _readable(image)))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def load(self, image: Source, max_pixels: int = MAX_PIXELS) -> tuple[str, np.ndarray | None, str]:
        """Load one image. Returns (name, pixels uint8 (img_size, img_size, 3), "") or (name, None, error).

        For the kinds of `image` see `predict`. A file with more than `max_pixels` is an error. Raises TypeError for
        other values.
        """
        image = _readable(image)
        name = os.fsdecode(image) if isinstance(image, str | os.PathLike) else "image"
        try:
            if isinstance(image, Image.Image):
                with as_image_errors(), ROOM.take(memory_of(image)):
                    return name, fit(to_rgb(upright(image), bits_of(image)), self.preprocessing), ""
            with decoded(image, max_pixels) as pixels:
                return name, fit(pixels, self.preprocessing, max_pixels), ""
        except ImageError as error:
            return name, None, str(error)
        except OSError as error:
            return name, None, f"cannot be opened ({error.strerror})"

    def verify(self) -> str:
        """Run the self-test in the metadata. Returns the largest relative error of the logits. Raises ModelError."""
        expected = np.asarray(self.metadata["self_test"], np.float32)
        logits = self.logits(self_test_pixels(self.preprocessing.img_size))[0]
        scale = max(1.0, float(np.abs(expected).max()))
        error = float(np.abs(logits - expected).max()) / scale if logits.shape == expected.shape else float("inf")
        if not error <= SELF_TEST_TOLERANCE[self.metadata["precision"]]:
            raise ModelError(f"{self.path}: the self-test fails, the relative error of the logits is {error:.1e}")
        return f"{error:.1e}"


def _is_one(images: object) -> bool:
    """Whether `images` is a single image and not an iterable of images."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, str | os.PathLike | bytes | Image.Image) or hasattr(images, "read")


def _readable(image: Any) -> str | os.PathLike[str] | bytes | Image.Image:
    """Convert a file object to bytes and an array to a Pillow image, so that any thread can read it.

    Raises TypeError if it is not an image.
    """
    if isinstance(image, str | os.PathLike | bytes | Image.Image):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size and image.ndim in (2, 3):
        if image.ndim == 2 or image.shape[2] == 3:
            return Image.fromarray(np.ascontiguousarray(image))
    elif hasattr(image, "read") and isinstance(data := image.read(MAX_FILE_BYTES), bytes):
        return data
    raise TypeError(_not_an_image(image))


def _not_an_image(value: object) -> str:
    given = f"{value.dtype} array {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
    kinds = "a path, bytes, a binary file object, a Pillow image or a uint8 array (H, W, 3) or (H, W)"
    return f"{given}: not an image; give {kinds}, or a list of those"


def _check_count(name: str, number: object) -> None:
    if type(number) is not int or number < 1:
        raise ValueError(f"{name} must be a whole number above 0, not {number!r}")


def self_test_pixels(size: int) -> np.ndarray:
    """The image of the self-test, uint8 (1, size, size, 3): the high bytes of multiples of 2654435761."""
    values = np.arange(size * size * 3, dtype=np.uint64) * np.uint64(2654435761)
    return ((values >> np.uint64(24)) & np.uint64(255)).astype(np.uint8).reshape(1, size, size, 3)


def digest_of(data: bytes, digest: str) -> str:
    """The sha256 of a model file in which the hex digits of `digest` are replaced by zeros."""
    return hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest()


def find_model(model: str | os.PathLike[str]) -> Path:
    """The path of a .onnx file, or of model.onnx in an exported run folder. Raises ModelError."""
    path = Path(model)
    for inside in ("export/model.onnx", "model.onnx"):
        if os.path.isdir(path) and (path / inside).is_file():  # noqa: PTH112
            return path / inside
    if os.path.isdir(path):  # noqa: PTH112 - it returns False for a name that is too long
        raise ModelError(f"{path}: there is no model.onnx in it; export the run first: resnet-dist export {path}")
    return path


def _checked(path: Path) -> str | bytes:
    """Verify the checksum of a model file and return what onnxruntime must load: the path or the bytes.

    A model loaded from a path can make onnxruntime read other files, if it contains one of two words. Such a model is
    loaded from bytes, which takes more memory. Raises ModelError.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: a pipe or a device, not a file")
        if status.st_size > MAX_MODEL_BYTES:
            raise ModelError(f"{path}: larger than {MAX_MODEL_BYTES >> 20} MiB, not a model of resnet-dist")
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    stored = re.search(DIGEST.encode() + rb"\x12\x40([0-9a-f]{64})", data)  # a protobuf field of 64 bytes
    if stored is None or data.count(stored[1]) != 1:
        raise ModelError(f"{path}: not a complete ONNX file exported by resnet-dist (it contains no checksum)")
    if digest_of(data, stored[1].decode()) != stored[1].decode():
        raise ModelError(f"{path}: damaged or changed: its content does not match its checksum")
    return data if b"location" in data or b"EPContext" in data else str(path)


def open_session(model: str | bytes, threads: int | None, providers: str, name: str) -> Any:
    """An onnxruntime session for a model file or its bytes. `name` is its name in errors. Raises ModelError."""
    names = provider_names(providers)
    session = _started(model, threads, names, providers == "auto", name)
    stopped = [SHORT.get(provider, provider) for provider in names if provider not in session.get_providers()]
    if providers != "auto" and stopped:
        raise ModelError(
            f"--providers {providers}: {stopped[0]} is part of this onnxruntime but does not start here; check its "
            "driver and libraries"
        )
    return session


def _started(model: str | bytes, threads: int | None, names: list[str], fewer: bool, name: str) -> Any:
    """A session with these providers; with `fewer`, without the first ones if they fail. Raises ModelError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Spinning takes CPU time from other processes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # errors are reported below in one line
    settings = [PROVIDER_OPTIONS.get(provider, {}) for provider in names]
    try:  # onnxruntime's own fallback prints to standard output
        return onnxruntime.InferenceSession(model, options, names, settings, enable_fallback=0)
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen types, UnicodeDecodeError among them
        if fewer and len(names) > 1:
            return _started(model, threads, names[1:], fewer, name)
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"{name}: onnxruntime {onnxruntime.__version__} cannot load this ONNX model ({reason})"
        ) from None


def provider_names(providers: str) -> list[str]:
    """onnxruntime's names of the providers that `--providers` names. Raises ModelError if it lacks one of them."""
    try:
        import onnxruntime
    except ImportError:
        raise ModelError("onnxruntime is missing: pip install onnxruntime") from None
    available = onnxruntime.get_available_providers()
    if providers == "auto":
        return [name for name in PROVIDERS.values() if name in available]
    named = [PROVIDERS.get(name.strip(), name.strip()) for name in providers.split(",")]
    if not set(named) <= set(available):
        here = ", ".join(SHORT.get(name, name) for name in available)
        raise ModelError(f"--providers {providers}: this onnxruntime has only {here}")
    return list(dict.fromkeys(named))


def _read_metadata(path: Path, text: str) -> dict[str, Any]:
    """The metadata of a model file, checked. Raises ModelError."""
    try:
        if not text or len(text) > MAX_METADATA_BYTES:
            raise ValueError(f"its metadata must have 1 to {MAX_METADATA_BYTES} characters")
        values = json.loads(text)
        classes = values["classes"]
        if not isinstance(classes, list) or not 1 <= len(classes) <= MAX_CLASSES or not all(map(_is_name, classes)):
            raise ValueError("classes must be a list of names")
        Preprocessing.from_dict(values["preprocessing"])
        if len(values["self_test"]) != len(classes) or not 0 < float(values["temperature"]) < 1e6:
            raise ValueError("self_test must have one logit per class, and temperature must be in 0..1e6")
        limits = values.get("thresholds", [])
        if len(limits) not in (0, len(classes)) or not all(n is None or 0 <= float(n) <= 1 for n in limits):
            raise ValueError("thresholds must be one number in 0..1 or null per class")
        if values["precision"] not in SELF_TEST_TOLERANCE:
            raise ValueError(f"precision must be one of {', '.join(SELF_TEST_TOLERANCE)}")
        if not all(isinstance(logit, int | float) for logit in values["self_test"]):
            raise ValueError("self_test must be a list of numbers")
        if not all(map(_is_name, values.get("verified_with", []))):
            raise ValueError("verified_with must be a list of names")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{path}: not a model that resnet-dist exported ({error})") from None
    return dict(values)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1024


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class UsageError(Exception):
    """The command line is wrong. One line."""

    exit_code = 2


class FolderError(UsageError):
    """A folder cannot be listed, or no image was found. One line."""

    exit_code = 3


class OutputError(UsageError):
    """The output cannot be written. One line."""

    exit_code = 4


def _cannot_write(option: str, file: Path, error: OSError) -> Exception:
    kind = OutputError if error.errno in DISK_ERRORS else UsageError
    return kind(f"{option} {file}: cannot be written ({error.strerror or error})")


def find_images(inputs: Sequence[str], say: Callable[[str], None] = lambda line: None) -> Iterator[str]:
    """Yield the paths of images. `inputs`: files, folders, glob patterns, or `-` for a list of paths on standard input.

    `say` is called with one line about the files that are ignored. Raises UsageError for a URL, and FolderError if a
    folder cannot be listed or no image is found.
    """
    ignored: Counter[str] = Counter()
    notes: list[str] = []
    count = 0
    for text in inputs:
        for path in _named_by(text):
            try:
                for image in images_below(Path(path), ignored, notes) if os.path.isdir(path) else [path]:  # noqa: PTH112
                    count += 1
                    yield image
            except OSError as error:
                raise FolderError(f"{error.filename}: cannot be listed ({error.strerror})") from None
    if not count:
        raise FolderError(f"{', '.join(inputs)}: no images found{ignored_text(ignored)}")
    for line in (*notes, *([f"ignored{ignored_text(ignored)}"] if ignored else [])):
        say(line)


def _named_by(text: str) -> Iterable[str]:
    """The paths that one INPUT names."""
    if text == "-":
        return (_supported(line.rstrip("\n")) for line in sys.stdin if line.strip())
    if os.path.lexists(_supported(text)):
        return [text]
    return sorted(glob.glob(text, recursive=True)) or [text]  # noqa: PTH207 - Path.glob refuses absolute patterns


def _supported(text: str) -> str:
    """The same text. Raises UsageError for a URL and for a video."""
    if text.startswith(("http://", "https://")):
        raise UsageError(f"{text}: URLs are not supported; download the image first")
    if Path(text).suffix.lower() in VIDEOS:
        raise UsageError(f"{text}: videos are not supported; extract frames first, such as ffmpeg -i VIDEO %05d.png")
    return text


def main(arguments: Sequence[str] | None = None, program: str = "predict.py") -> int:
    """Run the command line.

    Returns 0, or 2 (wrong usage), 3 (an image could not be read, or none of --images was recorded), 4 (the output
    cannot be written), 6 (the model is missing, damaged or not from resnet-dist, or fails --verify).
    """
    _prepare_streams()
    try:
        code = _run(arguments, program)
        with _writing():
            sys.stdout.flush()
        return code
    except (UsageError, ModelError) as error:
        _say(f"{program}: error: {error}")
        return error.exit_code
    except BrokenPipeError:  # such as `... | head`, which ends early
        _silence(sys.stdout)
        return 0


def _run(arguments: Sequence[str] | None, program: str) -> int:
    try:
        options = parser_for(program).parse_intermixed_args(arguments)
    except SystemExit:  # --help was printed
        return 0
    _check_options(options)
    predictor = Predictor(options.model, options.threads, options.providers)
    if warning := predictor.warning:
        _say(warning)
    if options.verify:
        print(f"{predictor.path}: checksum and self-test pass (relative error of the logits: {predictor.verify()})")
        if options.images:
            print(f"{predictor.path}: {repeat_gate(predictor, find_images([options.images], _say))}")
        return 0
    if not options.inputs:
        raise UsageError(
            "INPUT is missing: give image files, folders, patterns, or - to read a list of paths from standard input"
        )
    return _predict(predictor, options)


def _check_options(options: argparse.Namespace) -> None:
    """Raise UsageError if options do not fit together."""
    if options.verify and options.inputs:
        raise UsageError("--verify takes no INPUT; to repeat the gate on images, give --images DIR")
    if options.images and not options.verify:
        raise UsageError("--images needs --verify; images to predict are given without an option")
    if options.link and not options.sort_into:
        raise UsageError("--link needs --sort-into")
    for text in options.inputs if options.stream else ():
        if not os.path.isdir(text):  # noqa: PTH112 - it returns False for a name that is too long
            raise UsageError(f"{text}: --stream watches folders; this is not one")
    for text in options.inputs if options.sort_into else ():
        target = Path(os.path.realpath(options.sort_into))  # Path.resolve raises an error for a link to itself
        if os.path.isdir(text) and target.is_relative_to(os.path.realpath(text)):  # noqa: PTH112
            raise UsageError(f"--sort-into {options.sort_into}: it lies in {text}, whose images would be found twice")


def _prepare_streams() -> None:
    """Make the standard streams accept any file name. Open a stream that is closed, so that no file gets its number."""
    codecs.register_error(NAMES, _escaped)
    for name, errors in (("stdin", "surrogateescape"), ("stdout", NAMES), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            closed = os.open(os.devnull, os.O_RDONLY)  # writing to it fails, so lost output is noticed
            setattr(sys, name, open(closed, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write undecodable bytes of a file name unchanged, and escape characters that the encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:
        return bytes([code - 0xDC00]), error.start + 1
    return error.object[error.start].encode("ascii", "backslashreplace").decode(), error.start + 1


@contextmanager
def _writing() -> Iterator[None]:
    """Inside this context, a failed write to standard output becomes an OutputError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence(sys.stdout)
        raise OutputError(f"standard output: cannot be written ({error.strerror})") from None


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # there is no way left to report anything
        _silence(sys.stderr)


def _silence(stream: TextIO) -> None:
    """Discard the rest of the output; otherwise Python reports an error when it exits."""
    with suppress(OSError):  # the stream has no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser_for(program: str) -> argparse.ArgumentParser:
    """The parser of the command line; the documentation shows its help. Wrong options raise UsageError."""
    parser = _Parser(program, description="Predict the classes of images with an exported model.", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a .onnx file, or an exported run folder")
    parser.add_argument("inputs", metavar="INPUT", nargs="*", help="files, folders, patterns; - reads paths from stdin")
    parser.add_argument(
        "--top-k", type=_positive, default=5, metavar="N", help="number of classes per image (default: 5)"
    )
    parser.add_argument(
        "--format", choices=[*WRITERS], help="default: table on a terminal, else csv; excel: csv without formulas"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the predictions to this file")
    parser.add_argument(
        "--abstain-below", type=_probability, metavar="P", help="abstain if the best probability is below P"
    )
    parser.add_argument("--embed", metavar="FILE", help="also save the features of each image: .npy or .csv")
    parser.add_argument(
        "--save-grid", metavar="PNG", help=f"save a picture of the first {GRID} images and their classes"
    )
    parser.add_argument(
        "-b", "--batch-size", type=_positive, default=16, metavar="N", help="images per batch (default: 16)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--providers", default="auto", metavar="NAMES", help="onnxruntime providers, such as cuda,cpu (default: auto)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    parser.add_argument(
        "--sort-into", metavar="DIR", help=f"copy each image into DIR/CLASS, or DIR/{ABSTAINED}; nothing is overwritten"
    )
    parser.add_argument("--link", action="store_true", help="with --sort-into: make symbolic links, not copies")
    parser.add_argument(
        "--stream", action="store_true", help="watch folders, and predict images as they appear, until Ctrl-C"
    )
    parser.add_argument("--verify", action="store_true", help="check the checksum, run the self-test and stop")
    parser.add_argument(
        "--images", metavar="DIR", help="with --verify: repeat the gate on the validation images that export recorded"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _probability(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number in 0..1, not {text!r}")


def _predict(predictor: Predictor, options: argparse.Namespace) -> int:
    top_k = min(options.top_k, len(predictor.classes))
    shown: list[Prediction] = []
    embedded: list[tuple[str, np.ndarray | None]] = []
    bad = 0
    if options.embed:
        _check_embed(Path(options.embed), predictor)
    if options.save_grid and os.path.lexists(options.save_grid):
        raise UsageError(f"--save-grid {options.save_grid}: it exists already")
    settings = (top_k, options.batch_size, options.abstain_below, bool(options.embed))
    predictions = (_stream if options.stream else _all)(predictor, options.inputs, settings)
    sorter = Sorter(Path(options.sort_into), predictor.classes, options.link) if options.sort_into else None
    try:
        output = Path(options.output) if options.output else None
        target = output.open("x", newline="", encoding="utf-8", errors=NAMES) if output else None
    except OSError as error:
        raise _cannot_write("--output", Path(options.output), error) from None
    with _written(options.output, target) as stream:
        write = WRITERS[options.format or ("table" if stream.isatty() else "csv")]
        write(stream, top_k, None)
        for prediction in predictions:
            write(stream, top_k, prediction)
            if options.stream:
                stream.flush()
            bad += bool(prediction.error)
            if sorter:
                sorter.add(prediction)
            if options.embed:
                embedded.append((prediction.source, prediction.features))
            if len(shown) < GRID and not prediction.error:
                shown.append(prediction)
            if bad and options.strict:
                break
    if options.save_grid:
        save_grid(Path(options.save_grid), shown, predictor)
    if options.embed:
        save_features(Path(options.embed), embedded)
    if sorter:
        _say(str(sorter))
    if bad:
        _say(f"{bad} image{'s' if bad > 1 else ''} could not be read; the error column gives the reason")
    return 3 if bad else 0


def _all(predictor: Predictor, inputs: Sequence[str], settings: tuple[Any, ...]) -> Iterator[Prediction]:
    """The predictions for all images. Raises FolderError at once, not at the first item, if there is no image."""
    images = find_images(inputs, _say)
    return predictor.predict(itertools.chain([next(images)], images), *settings)


def _stream(predictor: Predictor, inputs: Sequence[str], settings: tuple[Any, ...]) -> Iterator[Prediction]:
    """The predictions for the images in folders, as they appear, until Ctrl-C or SIGTERM. A second one ends at once."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for paths in watch(inputs, received):
            for prediction in predictor.predict(paths, *settings):
                yield prediction
                if received:
                    return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


POLL, SETTLED = 0.25, 1.0  # seconds


def watch(folders: Sequence[str], stopped: Sequence[object]) -> Iterator[list[str]]:
    """Yield lists of images in folders, until `stopped` is not empty: first those that are there, then new ones.

    An image is yielded when it is not empty and its size and time have not changed for a second, so that files that are
    being written are waited for; and again after it has changed. Raises FolderError if a folder cannot be listed.
    """
    seen: dict[str, tuple[tuple[int, int], float | None]] = {}  # its size and time; since when, None once it is yielded
    while not stopped:
        now, ready, known = time.monotonic(), [], seen
        seen = {}
        for path, state in _states(folders):
            old, since = known.get(path, (None, None))
            seen[path] = (state, since if state == old else now)
            if state == old and since is not None and state[0] and now - since >= SETTLED:
                seen[path] = (state, None)
                ready.append(path)
        if ready:
            yield ready
        else:
            time.sleep(POLL)


def _states(folders: Sequence[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Each image in the folders, with its size and time. Files and folders that vanish meanwhile are left out."""
    for folder in folders:
        try:
            for path in images_below(Path(folder), Counter(), []):
                with suppress(OSError):
                    status = Path(path).stat()
                    yield path, (status.st_size, status.st_mtime_ns)
        except OSError as error:
            if not (isinstance(error, FileNotFoundError) and os.path.isdir(folder)):  # noqa: PTH112
                raise FolderError(f"{error.filename}: cannot be listed ({error.strerror})") from None


def repeat_gate(predictor: Predictor, images: Iterable[str]) -> str:
    """Compare this machine with PyTorch, as the gate of the export did. Returns the result as text.

    The gate recorded its images in gate.json, next to the model; a file is recognised by its content, and others are
    ignored. Pixels after resize and crop must be equal. float32 logits must be within 1e-4, relative to the largest;
    fp16 and int8 must give PyTorch's class on at least the share that the export demanded (5 % level). Raises
    ModelError, or FolderError if none of the images was recorded.
    """
    rows, bound = _read_gate(predictor)
    recorded, off, same = len(rows), [0.0], 0
    for path in images:
        data = _content(path)
        found = rows.pop(hashlib.sha256(data).hexdigest(), None)
        if found is None:
            continue
        digest, expected = found
        _, pixels, error = predictor.load(data)
        if pixels is None or hashlib.sha256(pixels.tobytes()).hexdigest() != digest:
            reason = error or "its pixels after resize and crop differ from training's; another Pillow or libjpeg?"
            raise ModelError(f"{path}: {reason}")
        logits = predictor.logits(pixels[None])[0]
        off.append(float(np.abs(logits - expected).max()) / max(1.0, float(np.abs(expected).max())))
        same += int(logits.argmax() == expected.argmax())
        if predictor.metadata["precision"] == "fp32" and not off[-1] <= LOGITS_TOLERANCE:
            raise ModelError(f"{path}: relative error of the logits {off[-1]:.1e}, more than {LOGITS_TOLERANCE:g}")
    count = recorded - len(rows)
    if not count:
        raise FolderError("--images: no image there is one that the export was verified on; give its validation images")
    share = same / count
    result = f"with {predictor.provider}, {count} of the {recorded} images of the gate: pixels equal, logits within "
    result += f"{max(off):.1e} of PyTorch's, same class on {100 * share:.2f} %"
    if bound - share > 1.96 * (bound * (1 - bound) / count) ** 0.5:
        raise ModelError(f"{predictor.path}: {result}, less than the {100 * bound:g} % that the export demanded")
    return result


def _content(path: str) -> bytes:
    """The bytes of an image file; none if it cannot be read."""
    with suppress(OSError, ImageError), file_of(path) as file:
        return file.read(MAX_FILE_BYTES)
    return b""


def _read_gate(predictor: Predictor) -> tuple[dict[str, tuple[str, np.ndarray]], float]:
    """Read gate.json next to a model: sha256 of a file -> sha256 of its pixels, and PyTorch's logits, (classes,).

    Also the share of images (0..1) on which this precision must give PyTorch's class. Raises ModelError.
    """
    path = predictor.path.with_name(GATE)
    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise ValueError(f"larger than {MAX_MODEL_BYTES >> 20} MiB")
        gate = json.loads(path.read_bytes())
        checkpoint, bound = gate["checkpoint_sha256"], float(gate["min_agreement"][predictor.metadata["precision"]])
        rows = {str(e["file"]): (str(e["pixels"]), np.array(e["logits"], np.float32)) for e in gate["images"]}
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; an export that was verified on image files writes it") from None
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({str(error) or error!r})") from None
    shapes = {logits.shape for _, logits in rows.values()}
    if checkpoint != predictor.metadata["checkpoint_sha256"] or shapes != {(len(predictor.classes),)}:
        raise ModelError(f"{path}: it belongs to another model than {predictor.path}")
    return rows, bound


# ---------------------------------------------------------------------------------------------------------------------
# --sort-into

ABSTAINED = "_abstained"
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]')
RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
RESERVED |= {f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789¹²³"}
NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems such as exFAT


def folder_names(classes: Sequence[str]) -> dict[str, str]:
    """A folder name for each class: its own name if every system accepts it, otherwise a similar one.

    No two classes share a folder, also where upper and lower case are the same, or two ways to write an accent.
    """
    safe = [_folder_name(name) for name in classes]
    names: dict[str, str] = {}
    taken = {ABSTAINED}
    for number in sorted(range(len(classes)), key=lambda number: safe[number] != classes[number]):
        name = safe[number]
        while (same := unicodedata.normalize("NFC", name).casefold()) in taken:
            name = f"{name}_{number}"
        taken.add(same)
        names[classes[number]] = name
    return names


def _folder_name(text: str) -> str:
    name = UNSAFE.sub("_", text).strip(". ").encode()[:200].decode(errors="ignore") or "_"
    stem, dot, rest = name.partition(".")
    return f"{stem}_{dot}{rest}" if stem.lower() in RESERVED else name


class Sorter:
    """Copies or links predicted images into one folder per class. `str` says how many are where.

    A file that exists is never overwritten: an image with its name gets the next free one, `name-2.jpg`, unless it is
    the same image byte for byte. A file with the name of a copy is complete. Images that cannot be read are not copied.
    """

    def __init__(self, root: Path, classes: Sequence[str], link: bool) -> None:
        self._root, self._link, self._folders = root, link, folder_names(classes)
        self._counts: Counter[str] = Counter()
        for label, folder in self._folders.items():
            if label != folder:
                _say(f"the class {label!r} is sorted into the folder {folder}")
        _make_folder(root)

    def __str__(self) -> str:
        parts = ", ".join(f"{count} in {folder}" for folder, count in sorted(self._counts.items()))
        return f"sorted into {self._root}: {parts or 'no images'}"

    def add(self, prediction: Prediction) -> None:
        """Copy or link one image. Raises OutputError or UsageError if that is not possible."""
        if prediction.error:
            return
        folder = ABSTAINED if prediction.abstained else self._folders[prediction.classes[0]]
        source = Path(prediction.source)
        try:
            with source.open("rb") as data:
                self._put(source, data, folder)
        except OSError as error:  # such as a file that was removed meanwhile
            _say(f"WARNING: {source}: not sorted, it cannot be opened ({error.strerror})")
        else:
            self._counts[folder] += 1

    def _put(self, source: Path, data: BinaryIO, folder: str) -> None:
        target = self._root / folder
        _make_folder(target)
        try:
            for number in itertools.count(1):
                file = target / (source.name if number == 1 else f"{source.stem}-{number}{source.suffix}")
                if not os.path.lexists(file):
                    return self._write(source, data, file)
                is_of_its_kind = self._link or not file.is_symlink()  # a link is no copy
                if is_of_its_kind and file.is_file() and filecmp.cmp(source, file, shallow=False):
                    return
        except OSError as error:
            raise _cannot_write("--sort-into", target, error) from None

    def _write(self, source: Path, data: BinaryIO, file: Path) -> None:
        if self._link:
            file.symlink_to(source.absolute())
            return
        partial = file.with_name(f".partial-{os.getpid()}")
        try:
            with partial.open("wb") as copy:
                shutil.copyfileobj(data, copy)
            _rename(partial, file)
        finally:
            partial.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises OutputError or UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--sort-into: {folder} is a file; choose another folder") from None
    except OSError as error:
        raise _cannot_write("--sort-into", folder, error) from None


def _rename(file: Path, name: Path) -> None:
    """Give a file a name that is free; where the file system can, without replacing one that appears meanwhile."""
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        file.rename(name)


# ---------------------------------------------------------------------------------------------------------------------
# Output


@contextmanager
def _written(name: str | None, target: TextIO | None) -> Iterator[TextIO]:
    """The stream to write to: `target`, or standard output. A full disk raises OutputError."""
    if target is None:
        with _writing():
            yield sys.stdout
            sys.stdout.flush()
        return
    try:
        with target:
            yield target
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise _cannot_write("--output", Path(str(name)), error) from None


def _check_embed(file: Path, predictor: Predictor) -> None:
    if file.suffix not in (".npy", ".csv"):
        raise UsageError(f"--embed {file}: the name must end in .npy or .csv")
    if os.path.lexists(file) or not file.parent.is_dir():
        raise UsageError(
            f"--embed {file}: {'it exists already' if os.path.lexists(file) else 'its folder does not exist'}"
        )
    if not predictor.has_features:
        raise ModelError(f"{predictor.path}: the model has no features; export it with --embeddings")


def save_features(file: Path, rows: Sequence[tuple[str, np.ndarray | None]]) -> None:
    """Write features as float32 (images, F) to .npy, or as rows path,f0..fF-1 to .csv; NaN for an unreadable image."""
    width = next((len(features) for _, features in rows if features is not None), 0)
    none = np.full(width, np.nan, np.float32)
    table = np.array([none if f is None else f for _, f in rows], np.float32).reshape(len(rows), width)
    try:
        if file.suffix == ".npy":
            with file.open("xb") as binary:
                np.save(binary, table, allow_pickle=False)
            return
        with file.open("x", newline="", encoding="utf-8", errors=NAMES) as stream:
            lines = ([name, *map(str, values)] for (name, _), values in zip(rows, table, strict=True))
            for line in itertools.chain([["path", *(f"f{i}" for i in range(width))]], lines):
                _write_row(stream, line)
    except OSError as error:
        raise _cannot_write("--embed", file, error) from None


def _write_csv(stream: TextIO, top_k: int, prediction: Prediction | None, inert: bool = False) -> None:
    """Write a row path,prediction,top1..topk,p1..pk,abstained,error; for None, write the header.

    The prediction is empty if the model abstained. With `inert`, a cell that a spreadsheet would evaluate as a formula
    starts with an apostrophe.
    """
    if prediction is None:
        ranks = range(1, top_k + 1)
        named = [*(f"top{i}" for i in ranks), *(f"p{i}" for i in ranks)]
        _write_row(stream, ["path", "prediction", *named, "abstained", "error"])
        return
    names = prediction.classes or ("",) * top_k
    values = [str(np.float32(p)) for p in prediction.probabilities] or [""] * top_k
    abstained = "" if prediction.error else str(prediction.abstained).lower()
    label = "" if prediction.abstained else names[0]
    row = [prediction.source, label, *names, *values, abstained, prediction.error]
    _write_row(stream, ["'" + c if inert and c.startswith(("=", "+", "-", "@", "\t", "\r")) else c for c in row])


def _write_row(stream: TextIO, row: Sequence[str]) -> None:
    # Before Python 3.13, csv does not quote a lone carriage return, which then ends the row for a reader.
    quote_all = any("\r" in cell for cell in row)
    csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL).writerow(row)


def _write_jsonl(stream: TextIO, top_k: int, prediction: Prediction | None) -> None:
    if prediction is not None:
        stream.write(json.dumps(prediction.to_dict()) + "\n")


def _write_table(stream: TextIO, top_k: int, prediction: Prediction | None) -> None:
    if prediction is not None:
        best = "  ".join(f"{c} {p:.3f}" for c, p in zip(prediction.classes, prediction.probabilities, strict=True))
        best = f"ABSTAINED {best}" if prediction.abstained else best
        text = f"{prediction.source}  {'ERROR ' + prediction.error if prediction.error else best}"
        stream.write("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + "\n")


Writer = Callable[[TextIO, int, Prediction | None], None]
WRITERS: dict[str, Writer] = {"table": _write_table, "csv": _write_csv, "jsonl": _write_jsonl}
WRITERS["excel"] = partial(_write_csv, inert=True)
GRID, TILE = 16, 160


def save_grid(file: Path, predictions: Sequence[Prediction], predictor: Predictor) -> None:
    """Save a picture of up to 16 images as the network sees them, four in a row, with the best class of each."""
    rows = max(1, -(-len(predictions) // 4))
    sheet = Image.new("RGB", (4 * (TILE + 8), rows * (TILE + 24)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, prediction in enumerate(predictions):
        _, pixels, _ = predictor.load(prediction.source)
        x, y = 4 + number % 4 * (TILE + 8), number // 4 * (TILE + 24)
        if pixels is not None:
            sheet.paste(Image.fromarray(pixels).resize((TILE, TILE)), (x, y + 18))
        name = "".join(c if c.isprintable() else "?" for c in prediction.classes[0])[:20]
        draw.text((x, y + 3), f"{name} {prediction.probabilities[0]:.2f}", fill="black")
    try:
        with file.open("xb") as stream:
            sheet.save(stream, Image.registered_extensions().get(file.suffix.lower(), "PNG"))
    except OSError as error:
        raise _cannot_write("--save-grid", file, error) from None


if __name__ == "__main__":
    sys.exit(main())
