"""Decoded images kept in memory or on disk: shared by the processes of a machine, filled by whoever decodes first.

What comes out is bit for bit what was decoded, and of the file as it is now: an entry is used only while the file's
size and times are those it was decoded at, and only once its checksum was verified by the process that uses it.
"""

import hashlib
import json
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

# What an entry says of its image. height 0: there is none yet. checksum: of the fields before it and of the pixels.
RECORD = np.dtype(
    {
        "names": ["bytes", "mtime_ns", "ctime_ns", "offset", "height", "width", "checksum"],
        "formats": ["i8", "i8", "i8", "i8", "i4", "i4", "i8"],
    }
)
START = 64  # bytes before the records; the first eight are the place of the next image
SAMPLED = 200  # headers that are read to estimate the memory that whole images take
SHARE = {"auto": 0.5, "ram": 0.9, "device": 0.9, "disk": 0.9}  # of what is free, that may be taken
GEOMETRY = ("img_size", "resize_mode", "resize", "interpolation", "fill")


class ImageCache:
    """The images of a table by position, each decoded once, and again when its file changes.

    `file` is a file of its own for this table and geometry, in memory or on a disk; it may be open in any number of
    processes, and may grow to `room` bytes of pixels. What does not fit is decoded every time. Raises MachineError
    where the file cannot be made or mapped.
    """

    def __init__(self, reader: Reader, file: Path, room: int) -> None:
        self.reader, self.file, self.room = reader, file, room
        samples = len(reader.table)
        self._first = START + samples * RECORD.itemsize
        try:
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(self._fd).st_size < self._first + room:  # never shorter: another process may have it mapped
                os.ftruncate(self._fd, self._first + room)  # sparse: takes no space before something is written
            self._bytes = np.frombuffer(mmap.mmap(self._fd, 0), np.uint8)
        except OSError as error:
            raise MachineError(f"{file}: cannot hold images ({error.strerror}); take --cache none") from None
        self._records = self._bytes[START : self._first].view(RECORD)
        ends = self._records["offset"] + self._records["height"] * self._records["width"].astype(np.int64) * 3
        self._free = max(self._first, int(ends.max(initial=0)))  # and on, whatever the first bytes say
        self._verified = np.zeros(samples, np.int64)  # checksums that this process has verified

    def __reduce__(self) -> tuple[type["ImageCache"], tuple[Reader, Path, int]]:
        return type(self), (self.reader, self.file, self.room)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # it was not opened, or the interpreter is gone
            os.close(self._fd)

    def __call__(self, index: int) -> np.ndarray:
        """Image number `index`, uint8 (H, W, 3), not to be written to. Raises DataError."""
        table = self.reader.table
        try:
            status = (table.root / table.paths[index]).stat()
        except OSError:
            return self.reader(index)  # which says what is wrong
        record = self._records[index].copy()
        if record["height"]:
            pixels = self._kept(index, record, status)
            if pixels is not None:
                return pixels
        pixels = self.reader(index)
        self._keep(index, pixels, status)
        return pixels

    def _kept(self, index: int, record: np.void, status: os.stat_result) -> np.ndarray | None:
        """The pixels of an entry, if it is of the file as it is and sound."""
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

    def _keep(self, index: int, pixels: np.ndarray, status: os.stat_result) -> None:
        record = np.zeros((), RECORD)
        times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        pixels = np.ascontiguousarray(pixels)
        try:  # written, not stored through the map: a full disk is then an error and not the end of the process
            offset = self._place(pixels.nbytes)
            if offset is None:
                return
            record[()] = (*times, offset, *pixels.shape[:2], 0)
            record["checksum"] = _checksum(record, pixels)
            _write(self._fd, pixels, offset)
            _write(self._fd, record, START + index * RECORD.itemsize)
        except OSError:
            self.room = 0  # nothing more is kept
        else:
            self._verified[index] = record["checksum"]

    def _place(self, size: int) -> int | None:
        """Take so many bytes, alone among all processes; None where there is no more room. Raises OSError."""
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
    """Of an entry; never 0."""
    fields = record.tobytes()[: RECORD.fields["checksum"][1]]  # type: ignore[index]
    return zlib.crc32(np.ascontiguousarray(pixels).data, zlib.crc32(fields)) + 1


def _write(fd: int, values: np.ndarray, offset: int) -> None:
    data = values.reshape(-1).view(np.uint8).data
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


# ---------------------------------------------------------------------------------------------------------------------
# Where the files are


def disk_file(folder: Path, reader: Reader) -> Path:
    """The file for the images of a reader: named by all that their pixels depend on but the image files themselves."""
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
        raise MachineError(f"{folder}: cannot be made ({error.strerror}); name another --cache-dir") from None
    return folder / f"{name[:32]}.images"


def default_folder() -> Path:
    """Where decoded images are kept on disk: resnet-dist/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet-dist"


# ---------------------------------------------------------------------------------------------------------------------
# Whether it fits


def bytes_needed(reader: Reader) -> int:
    """What the decoded images of a reader take: exact in the evaluation geometry, else estimated from some headers."""
    samples = len(reader.table)
    if reader.spec is not None:
        return samples * (reader.spec.img_size**2 * 3 + RECORD.itemsize)
    sizes = []
    for index in np.unique(np.linspace(0, samples - 1, min(samples, SAMPLED)).astype(int)):
        with suppress(ImageError, OSError), opened(reader.table.root / reader.table.paths[int(index)]) as image:
            scale = jpeg_scale(image.size, reader.least) if reader.least and image.format == "JPEG" else 1
            sizes.append(3 * (image.width // scale) * (image.height // scale))
    return round(samples * (float(np.mean(sizes or [0])) + RECORD.itemsize))


@dataclass(frozen=True)
class Tier:
    """Where decoded images are kept: "none", "ram" or "disk"; how many bytes they may take; and why, for the user."""

    name: str
    room: int
    why: str


def choose_tier(asked: str, readers: Sequence[Reader], epochs: int, folder: Path) -> Tier:
    """Decide, from what is asked for and what is free. Raises MachineError where what was asked for does not fit."""
    if asked == "none":
        return Tier("none", 0, "--cache none")
    if asked == "auto" and (epochs == 1 or not hasattr(os, "memfd_create")):
        return Tier("none", 0, "one epoch reads each image once" if epochs == 1 else "needs Linux")
    if asked in ("ram", "device") and not hasattr(os, "memfd_create"):
        raise MachineError(f"--cache {asked}: needs Linux; use --cache disk")
    if asked == "disk" and not hasattr(os, "lockf"):
        raise MachineError("--cache disk: needs Linux or macOS; use --cache none")
    needed = sum(map(bytes_needed, readers))
    free = _free_disk(folder, readers) if asked == "disk" else launcher.available_memory()
    name = "disk" if asked == "disk" else "ram"
    room = int(SHARE[asked] * free)
    where = f"free in {folder}" if name == "disk" else "of free memory"
    size = f"about {_readable(needed)}"
    if needed <= room:
        return Tier(name, room, f"{size}, {_readable(free)} {where}")
    if asked == "auto":
        return Tier("none", 0, f"{size} is more than half of the {_readable(free)} {where}; --cache disk may help")
    other = "a --cache-dir with more room" if name == "disk" else "--cache disk"
    raise MachineError(f"--cache {asked}: {size}, but there is {_readable(free)} {where}; take {other} or --cache none")


def shares(readers: Sequence[Reader], room: int) -> list[int]:
    """The room divided among readers, by what they need."""
    needed = [bytes_needed(reader) for reader in readers]
    return [room * size // max(1, sum(needed)) for size in needed]


def _free_disk(folder: Path, readers: Sequence[Reader]) -> int:
    """What is free, with what the files of these readers already take."""
    kept = [file.stat().st_blocks * 512 for reader in readers if (file := disk_file(folder, reader)).exists()]
    return shutil.disk_usage(folder).free + sum(kept)


def _readable(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
