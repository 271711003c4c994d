"""Check every image of a data set: unusable, unusual, duplicate, in two splits, or with two labels."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.predict import ORIENTATION, ROOM, ImageError, Preprocessing, file_of, loaded, memory_of, opened
from resnet_dist.config.fields import required
from resnet_dist.config.schema import DataConfig
from resnet_dist.data.index import ImageIndex, ImageTable
from resnet_dist.data.same_file import as_identities, is_same, of_one_file
from resnet_dist.errors import DataError, MachineError
from resnet_dist.files.run import write_atomically
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.wording import counted, listed

Seen = Callable[[Path, Image.Image], None]
AT_ONCE = 4096  # files in the queue of the threads
TINY = 32  # pixels; an image with a shorter side is called tiny
NEAR = 3  # near duplicates differ in at most this many bits of their 64-bit hashes
NEAR_COLOUR = 6  # and their 4x4 thumbnails differ by at most this on average, of 256 levels
EXTENSION_OF = {"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "TIFF": (".tif", ".tiff")}
NOT_CACHED = ("path", "label", "split", "identity")
EXTENSION_OF["PPM"] = (".ppm", ".pgm", ".pbm", ".pnm")


@dataclass(frozen=True)
class Finding:
    """The result for one file. `error`: why it cannot be used, or "". The hashes are empty if it was not decoded."""

    path: str
    label: str
    split: str
    error: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    rotated: bool = False
    wrong_extension: bool = False
    sha256: str = ""
    dhash: int = 0
    thumbnail: str = ""  # hex of 4x4 RGB
    # Device and inode; (0, 0) if the finding comes from the cache.
    identity: tuple[int, int] = field(default=(0, 0), compare=False)


def look(root: Path, path: str, label: str, split: str, full: bool, seen: Seen | None = None) -> Finding:
    """Check one file: its header and, with `full`, its pixels (to detect truncated files) and its hashes.

    `seen` is called with the path and the decoded image, which it may modify.
    """
    file = root / path
    facts: dict[str, Any] = {}
    try:
        with file_of(file) as stream:
            status = os.fstat(stream.fileno())
            facts["identity"] = status.st_dev, status.st_ino
            with opened(stream, whole=full) as image:
                facts |= {"format": image.format or "", "mode": image.mode}
                facts |= {"width": image.width, "height": image.height}
                if full:
                    facts |= _pixel_facts(image, lambda rgb: seen(file, rgb) if seen else None)
            if full:
                stream.seek(0)
                facts["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        usual = EXTENSION_OF.get(facts["format"], (f".{facts['format'].lower()}",))
        facts["wrong_extension"] = file.suffix.lower() not in usual
    except ImageError as error:
        return Finding(path, label, split, error=str(error))
    except OSError as error:
        return Finding(path, label, split, error=f"cannot be opened ({error.strerror})")
    return Finding(path, label, split, **facts)


def _pixel_facts(image: Image.Image, seen: Callable[[Image.Image], None]) -> dict[str, Any]:
    """Facts that need the pixels of an opened image. They are decoded once, within the memory budget."""
    with ROOM.take(memory_of(image)):  # before getexif, which decodes a PNG to find its Exif
        rotated = image.getexif().get(ORIENTATION, 1) != 1  # read it first: decoding a TIFF removes it
        rgb = loaded(image)
        thumbnail = rgb.resize((4, 4), Image.Resampling.BOX).tobytes().hex()
        facts = {"rotated": rotated, "dhash": difference_hash(rgb), "thumbnail": thumbnail}
        seen(rgb)
        return facts


def difference_hash(image: Image.Image) -> int:
    """dHash (Krawetz 2013): 64 bits, set where a 9x8 grey copy gets darker from left to right."""
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(small[:, 1:] < small[:, :-1]).tobytes(), "big")


def look_at_all(
    index: ImageIndex,
    full: bool,
    cache: "Cache | None" = None,
    advance: Callable[[], None] = lambda: None,
    seen: Seen | None = None,
) -> list[Finding]:
    """The findings of every file of an index, in its order. `seen`: see `look`."""
    return list(look_at_each(index, full, cache, advance, seen))


def look_at_each(
    index: ImageIndex,
    full: bool,
    cache: "Cache | None" = None,
    advance: Callable[[], None] = lambda: None,
    seen: Seen | None = None,
) -> Iterator[Finding]:
    """The findings of every file of an index, in its order, one at a time, so that a million need no memory.

    A pool of threads makes them: Pillow releases the interpreter's lock while it decodes.
    """
    jobs = (
        (path, index.classes[target], split)
        for split in ("train", "val", "test")
        for path, target in zip(index.part(split).paths, index.part(split).targets, strict=True)
    )

    def one(job: tuple[str, str, str]) -> Finding:
        finding = cache.get(index.root, job) if cache else None
        if finding is None:
            finding = look(index.root, *job, full, seen)
            if cache:
                cache.put(index.root, finding)
        return finding

    with ThreadPoolExecutor(launcher.cores()) as pool:
        while some := list(islice(jobs, AT_ONCE)):
            for finding in pool.map(one, some):
                advance()
                yield finding


class Cache:
    """Findings of full checks, kept on disk from one check to the next by path, size and time of change."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: dict[str, list[Any]] = {}
        try:
            loaded = json.loads(file.read_text())
            self.entries = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError, RecursionError):
            pass  # there is no cache yet, or it is damaged: every file is checked again

    def get(self, root: Path, job: tuple[str, str, str]) -> Finding | None:
        """The cached finding of a file, or None if there is none or the file has changed."""
        entry = self.entries.get(str((root / job[0]).absolute()))
        try:
            if entry is None or entry[0] != self._stamp(root / job[0]):
                return None
            return Finding(*job, **entry[1])
        except (OSError, TypeError, IndexError, KeyError):
            return None

    def put(self, root: Path, finding: Finding) -> None:
        """Store a finding."""
        path = root / finding.path
        facts = {name: value for name, value in asdict(finding).items() if name not in NOT_CACHED}
        if path.exists():
            self.entries[str(path.absolute())] = [self._stamp(path), facts]

    def save(self) -> None:
        """Write the findings to disk. If that fails, the next check starts without them."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(self.entries))
        except (OSError, MachineError):
            pass

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]


def without(index: ImageIndex, bad: Sequence[Finding]) -> ImageIndex:
    """The index without the files that cannot be used."""
    unusable = {(finding.path, finding.split) for finding in bad}

    def usable_part(split: str) -> ImageTable:
        table = index.part(split)
        rows = [row for row, path in enumerate(table.paths) if (path, split) not in unusable]
        return table.take(rows)

    return replace(index, train=usable_part("train"), val=usable_part("val"), test=usable_part("test"))


@dataclass
class Report:
    """All findings. Files in `errors` cannot be used; a person must judge the other findings."""

    findings: list[Finding]
    errors: list[Finding] = field(default_factory=list)
    duplicates: list[list[Finding]] = field(default_factory=list)
    near_duplicates: list[tuple[Finding, Finding]] = field(default_factory=list)

    @property
    def leaks(self) -> list[list[Finding]]:
        """Groups of identical files that are in several splits."""
        return [group for group in self.duplicates if len({f.split for f in group}) > 1]

    @property
    def near_leaks(self) -> list[tuple[Finding, Finding]]:
        """Pairs of images that look alike and are in different splits."""
        return [(a, b) for a, b in self.near_duplicates if a.split != b.split]

    @property
    def contradictions(self) -> list[list[Finding]]:
        """Groups of identical files with several labels."""
        return [group for group in self.duplicates if len({f.label for f in group}) > 1]


def report_on(findings: Sequence[Finding]) -> Report:
    """Group the findings: identical files by sha256, near duplicates by similar hashes and colours."""
    by_digest: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.sha256:
            by_digest[finding.sha256].append(finding)
    duplicates = [group for group in by_digest.values() if len(group) > 1]
    firsts = [group[0] for group in by_digest.values()]
    return Report(
        findings=list(findings),
        errors=[finding for finding in findings if finding.error],
        duplicates=duplicates,
        near_duplicates=[
            (firsts[a], firsts[b])
            for a, b in near_pairs([f.dhash for f in firsts])
            if colour_distance(firsts[a], firsts[b]) <= NEAR_COLOUR
        ],
    )


def colour_distance(a: Finding, b: Finding) -> float:
    """Mean absolute difference of the thumbnails, 0..255. The hash alone confuses round objects on white."""
    one, two = (np.frombuffer(bytes.fromhex(f.thumbnail), np.uint8).astype(int) for f in (a, b))
    return float(np.abs(one - two).mean())


def near_pairs(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of positions whose 64-bit hashes differ in at most 3 bits, each once, in order.

    Two such hashes are equal in at least one of their four 16-bit parts, so only hashes that share a part are
    compared. A hash of only zeros or only ones (a plain surface) carries no information and is skipped.
    """
    pairs = set()
    for part in range(4):
        buckets: dict[int, list[int]] = defaultdict(list)
        for position, value in enumerate(hashes):
            if value not in (0, (1 << 64) - 1):
                buckets[(value >> (16 * part)) & 0xFFFF].append(position)
        for positions in buckets.values():
            for a, b in combinations(positions, 2):
                if (hashes[a] ^ hashes[b]).bit_count() <= NEAR:
                    pairs.add((a, b))
    return iter(sorted(pairs))


def lost_by_cropping(findings: Sequence[Finding], spec: Preprocessing) -> tuple[float, int]:
    """The mean share of the area that the evaluation crop cuts off, and how many images lose more than half."""
    shares = []
    for finding in findings:
        if not finding.error and spec.resize_mode == "crop":
            short, long = sorted((finding.width, finding.height))
            seen = (spec.img_size / spec.resize) ** 2 * short / long
            shares.append(1 - seen)
    return (float(np.mean(shares)) if shares else 0.0), sum(share > 0.5 for share in shares)


def summary(report: Report, spec: Preprocessing) -> dict[str, Any]:
    """The report as plain JSON values."""
    good = [finding for finding in report.findings if not finding.error]
    shorts = sorted(min(f.width, f.height) for f in good)
    ratios = sorted(max(f.width, f.height) / min(f.width, f.height) for f in good)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for finding in report.findings:
        counts[finding.split][finding.label] += 1
    lost, half = lost_by_cropping(good, spec)
    return {
        "images": len(report.findings),
        "errors": [{"path": f.path, "error": f.error} for f in report.errors],
        "per_class": {split: dict(sorted(labels.items())) for split, labels in counts.items()},
        "imbalance": {split: max(c.values()) / min(c.values()) for split, c in counts.items()},
        "formats": dict(Counter(f.format for f in good)),
        "modes": dict(Counter(f.mode for f in good)),
        "wrong_extension": [f.path for f in good if f.wrong_extension],
        "rotated": sum(f.rotated for f in good),
        "tiny": [f.path for f in good if min(f.width, f.height) < TINY],
        "short_side": {"min": shorts[0], "median": shorts[len(shorts) // 2], "max": shorts[-1]} if shorts else {},
        "aspect_ratio": {"median": ratios[len(ratios) // 2], "max": ratios[-1]} if ratios else {},
        "crop": {"mean_share_cut": lost, "images_cut_by_half": half},
        "duplicates": [[_place_of(f) for f in group] for group in report.duplicates],
        "near_duplicates": [[_place_of(a), _place_of(b)] for a, b in report.near_duplicates],
        "leaks": len(report.leaks),
        "near_leaks": len(report.near_leaks),
        "contradictions": len(report.contradictions),
    }


def _place_of(finding: Finding) -> dict[str, str]:
    return {"path": finding.path, "label": finding.label, "split": finding.split}


def usable(index: ImageIndex, cfg: DataConfig) -> tuple[ImageIndex, list[Finding]]:
    """The index without the files that cannot be used, and the findings of those files.

    Reads headers, or with --check full every pixel. Raises DataError if there are such files and --bad-images is not
    skip, if they are more than --max-bad-share, and if two images are links to one file (`refuse_one_file_twice`).
    """
    bad: list[Finding] = []
    identities: list[tuple[int, int]] = []
    for finding in look_at_each(index, full=cfg.check == "full"):
        identities.append(finding.identity)
        if finding.error:
            bad.append(finding)
    is_folder = Path(required(cfg.data, "DATA")).is_dir()
    notes = refuse_one_file_twice(index, as_identities(identities), may_repeat=is_folder)
    total = len(index.train) + len(index.val) + len(index.test)
    if bad and (cfg.bad_images == "error" or len(bad) > cfg.max_bad_share * total):
        first = "; ".join(f"{index.root / finding.path}: {finding.error}" for finding in bad[:3])
        more = f"; and {len(bad) - 3} more (`resnet-dist check` lists them)" if len(bad) > 3 else ""
        way_out = "remove or replace them, or use --bad-images skip"
        if cfg.bad_images == "skip":
            way_out = f"that is more than --max-bad-share {cfg.max_bad_share:g} of {total}"
        raise DataError(f"{counted(len(bad), 'image')} cannot be used: {first}{more}; {way_out}")
    remaining = without(index, bad) if bad else index
    empty = [name for number, name in enumerate(index.classes) if number not in remaining.train.targets]
    if empty:
        raise DataError(f"class {listed(empty)} has no usable training image; replace the images or remove the class")
    return replace(remaining, notes=(*remaining.notes, *notes)), bad


def refuse_one_file_twice(index: ImageIndex, identities: np.ndarray, may_repeat: bool) -> list[str]:
    """Raise DataError if two images of an index are links to one file. `identities`: devices and inodes, (n, 2).

    With `may_repeat`, two cases are allowed. Several links in one split and class give the file more weight. Links in
    the same class of val and test give the single warning that is returned, because the test score is then biased.
    It is enough to compare each image with the first image of the same file.
    """
    parts = {split: index.part(split) for split in ("train", "val", "test")}
    splits = np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()])
    classes = np.concatenate([part.targets for part in parts.values()])
    pairs, warnings = of_one_file(identities), list[str]()
    if may_repeat:
        pairs = pairs[(splits[pairs[:, 0]] != splits[pairs[:, 1]]) | (classes[pairs[:, 0]] != classes[pairs[:, 1]])]

    def path(position: int) -> str:
        number = int(splits[position])
        part = tuple(parts.values())[number]
        return part.paths[position - int(np.searchsorted(splits, number))]

    for pair in pairs.tolist():
        chosen = may_repeat and bool(splits[pair].all()) and classes[pair[0]] == classes[pair[1]]
        if (chosen and warnings) or not is_same(*(index.root / path(position) for position in pair)):
            continue
        if chosen:
            warnings.append(
                f"WARNING: images of the test split are also used for validation ({path(pair[0])} and {path(pair[1])} "
                "are links to one file): its score is not a test score"
            )
            continue
        one, other = (f"'{path(at)}' ({index.classes[classes[at]]}, {tuple(parts)[splits[at]]})" for at in pair)
        raise DataError(
            f"{index.root}: {one} and {other} are links to one file: an image listed more than once; remove "
            "one of them, or list it in --exclude-list"
        )
    return warnings
