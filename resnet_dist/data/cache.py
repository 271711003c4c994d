"""A cache of decoded images, in memory or on disk, shared by the processes of a machine.

The pixels are bit-equal to those of a new decode. An entry is used only if the size and times of the image file have
not changed since it was decoded, and only after the process that uses it has verified its checksum.
"""

import hashlib
import json
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from export.predict import ImageError, opened
from resnet_dist.data.decode import Reader, jpeg_scale
from resnet_dist.errors import MachineError
from resnet_dist.runtime import environment as launcher

# The entry of one image. height 0: not cached yet. checksum: over the fields before it and the pixels.
RECORD = np.dtype(
    {
        "names": ["bytes", "mtime_ns", "ctime_ns", "offset", "height", "width", "checksum"],
        "formats": ["i8", "i8", "i8", "i8", "i4", "i4", "i8"],
    }
)
START = 64  # bytes before the records; the first eight are the offset of the next image
SAMPLED = 200  # headers that are read to estimate the memory that whole images take
SHARE = {"auto": 0.5, "ram": 0.9, "device": 0.9, "disk": 0.9}  # of what is free that may be used
GEOMETRY = ("img_size", "resize_mode", "resize", "interpolation", "fill")


class ImageCache:
    """The images of a table by position. Each is decoded once, and again if its file changes.

    `file`, in memory or on a disk, belongs to this table and geometry. Any number of processes may have it open. It
    grows to at most `room` bytes of pixels; an image that does not fit is decoded every time. Raises MachineError if
    the file cannot be created or mapped.
    """

    def __init__(self, reader: Reader, file: Path, room: int) -> None:
        self.reader, self.file, self.room = reader, file, room
        samples = len(reader.table)
        self._first = START + samples * RECORD.itemsize
        try:
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(self._fd).st_size < self._first + room:  # never shrink it: another process may have it mapped
                os.ftruncate(self._fd, self._first + room)  # sparse: takes no space until it is written
            self._bytes = np.frombuffer(mmap.mmap(self._fd, 0), np.uint8)
        except OSError as error:
            raise MachineError(f"{file}: cannot hold images ({error.strerror}); use --cache none") from None
        self._records = self._bytes[START : self._first].view(RECORD)
        ends = self._records["offset"] + self._records["height"] * self._records["width"].astype(np.int64) * 3
        self._free = max(self._first, int(ends.max(initial=0)))  # a lower limit, in case the first bytes are damaged
        self._verified = np.zeros(samples, np.int64)  # checksums that this process has verified

    def __reduce__(self) -> tuple[type["ImageCache"], tuple[Reader, Path, int]]:
        return type(self), (self.reader, self.file, self.room)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # it was not opened, or the interpreter is shutting down
            os.close(self._fd)

    def __call__(self, index: int) -> np.ndarray:
        """Image number `index`, uint8 (H, W, 3), not to be written to. Raises DataError."""
        table = self.reader.table
        try:
            status = table.path(index).stat()
        except OSError:
            return self.reader(index)  # raises the error that says what is wrong
        record = self._records[index].copy()
        if record["height"]:
            pixels = self._cached(index, record, status)
            if pixels is not None:
                return pixels
        pixels = self.reader(index)
        self._store(index, pixels, status)
        return pixels

    def _cached(self, index: int, record: np.void, status: os.stat_result) -> np.ndarray | None:
        """The pixels of an entry, or None if the file has changed or the entry is damaged."""
        now = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if now != (record["bytes"], record["mtime_ns"], record["ctime_ns"]):
            return None
        height, width, offset = int(record["height"]), int(record["width"]), int(record["offset"])
        pixels = self._bytes[offset : offset + height * width * 3]
        checksum = int(record["checksum"])
        if self._verified[index] != checksum:
            if len(pixels) != height * width * 3 or checksum != _checksum(record, pixels):
                return None
            self._verified[index] = checksum
        return pixels.reshape(height, width, 3)

    def _store(self, index: int, pixels: np.ndarray, status: os.stat_result) -> None:
        record = np.zeros((), RECORD)
        times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        pixels = np.ascontiguousarray(pixels)
        try:  # write(), because a full disk would kill the process if it stored through the map
            offset = self._reserve(pixels.nbytes)
            if offset is None:
                return
            record[()] = (*times, offset, *pixels.shape[:2], 0)
            record["checksum"] = _checksum(record, pixels)
            _write(self._fd, pixels, offset)
            _write(self._fd, record, START + index * RECORD.itemsize)
        except OSError:
            self.room = 0  # cache nothing more
        else:
            self._verified[index] = record["checksum"]

    def _reserve(self, size: int) -> int | None:
        """The offset of `size` new bytes, which no other process gets; None if there is no room. Raises OSError."""
        if not self.room:
            return None
        os.lockf(self._fd, os.F_LOCK, 0)
        try:
            offset = max(int(self._bytes[:8].view(np.int64)[0]), self._free)
            if offset + size > self._first + self.room:
                return None
            _write(self._fd, np.array(offset + size), 0)
            return offset
        finally:
            os.lockf(self._fd, os.F_ULOCK, 0)


def _checksum(record: np.ndarray | np.void, pixels: np.ndarray) -> int:
    """The checksum of an entry; never 0."""
    fields = record.tobytes()[: RECORD.fields["checksum"][1]]  # type: ignore[index]
    return zlib.crc32(np.ascontiguousarray(pixels).data, zlib.crc32(fields)) + 1


def _write(fd: int, values: np.ndarray, offset: int) -> None:
    data = values.reshape(-1).view(np.uint8).data
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


# ---------------------------------------------------------------------------------------------------------------------
# Where the cache files are


def disk_file(folder: Path, reader: Reader) -> Path:
    """The cache file of a reader. Its name is a hash of all that determines the pixels, except the image files."""
    table, spec = reader.table, reader.spec
    facts = {
        "root": str(table.root.absolute()),
        "paths": table.paths.digest(),
        "record": RECORD.descr,
        "geometry": [getattr(spec, name) for name in GEOMETRY] if spec else reader.least,
        "decoders": [version(name) for name in ("pillow", "torch", "torchvision")],
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be created ({error.strerror}); give another --cache-dir") from None
    return folder / f"{name[:32]}.images"


def default_folder() -> Path:
    """The default --cache-dir: resnet-dist/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet-dist"


# ---------------------------------------------------------------------------------------------------------------------
# Whether it fits


def bytes_needed(reader: Reader, short: float = math.inf) -> int:
    """Bytes of all decoded images: exact in the evaluation geometry, otherwise estimated from a sample of headers.

    `short`: images with a longer short side are shrunk to it.
    """
    samples = len(reader.table)
    if reader.spec is not None:
        return samples * (reader.spec.img_size**2 * 3 + RECORD.itemsize)
    sizes = []
    for row in reader.table.spread(SAMPLED):
        with suppress(ImageError, OSError), opened(reader.table.path(row)) as image:
            scale = jpeg_scale(image.size, reader.least) if reader.least and image.format == "JPEG" else 1
            width, height = image.width // scale, image.height // scale
            sizes.append(3 * width * height * min(1, short / min(width, height)) ** 2)
    return round(samples * (float(np.mean(sizes or [0])) + RECORD.itemsize))


@dataclass(frozen=True)
class Tier:
    """The place of the cache of decoded images ("none", "ram" or "disk"), its room in bytes, and the reason."""

    name: str
    room: int
    why: str


def choose_tier(setting: str, readers: Sequence[Reader], epochs: int, folder: Path) -> Tier:
    """Choose the place of the cache from --cache and the free memory or disk space.

    Raises MachineError if the images do not fit into the place that --cache names.
    """
    if setting == "none":
        return Tier("none", 0, "--cache none")
    if setting == "auto" and (epochs == 1 or not hasattr(os, "memfd_create")):
        return Tier("none", 0, "one epoch reads each image once" if epochs == 1 else "needs Linux")
    if setting in ("ram", "device") and not hasattr(os, "memfd_create"):
        raise MachineError(f"--cache {setting}: needs Linux; use --cache disk")
    if setting == "disk" and not hasattr(os, "lockf"):
        raise MachineError("--cache disk: needs Linux or macOS; use --cache none")
    needed = sum(map(bytes_needed, readers))
    free = _free_disk(folder, readers) if setting == "disk" else launcher.available_memory()
    name = "disk" if setting == "disk" else "ram"
    room = int(SHARE[setting] * free)
    place = f"free in {folder}" if name == "disk" else "of free memory"
    size = f"about {readable(needed)}"
    if needed <= room:
        return Tier(name, room, f"{size}, {readable(free)} {place}")
    if setting == "auto":
        return Tier("none", 0, f"{size} is more than half of the {readable(free)} {place}; --cache disk may help")
    other = "a --cache-dir with more space" if name == "disk" else "--cache disk"
    raise MachineError(f"--cache {setting}: {size}, but there is {readable(free)} {place}; use {other} or --cache none")


def shares(readers: Sequence[Reader], room: int) -> list[int]:
    """The room of each reader, in proportion to the bytes that it needs."""
    needed = [bytes_needed(reader) for reader in readers]
    return [room * size // max(1, sum(needed)) for size in needed]


def _free_disk(folder: Path, readers: Sequence[Reader]) -> int:
    """Free bytes, counting those that the cache files of these readers already take."""
    taken = [file.stat().st_blocks * 512 for reader in readers if (file := disk_file(folder, reader)).exists()]
    return shutil.disk_usage(folder).free + sum(taken)


def readable(size: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
