"""What is on disk for a run, and how it gets there: whole or not at all."""

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resnet_dist.errors import MachineError, ResnetDistError, UsageError
from resnet_dist.files.outputs import LOCK, TEMPORARY, existing, inside, is_free
from resnet_dist.files.reading import parse_json, read_bounded

if TYPE_CHECKING:
    from filelock import FileLock

FORMAT_VERSION = 1
MAX_FACTS = 1 << 24  # bytes of run.json
STATE_NAME = re.compile(r"step-\d{9,}(\.replaced\d*)?")  # the folder of a checkpoint to resume from
MANIFEST = "manifest.json"  # in it: written last, removed first
UNFINISHED = re.compile(r"^\.tmp-\d+-")  # before the name of a file while it is written
FOLDERS = ("checkpoints", "plots", "data")
LINKABLE = (*((name,) for name in FOLDERS), ("eval",), ("eval", "val"), ("tracker",))  # where training writes
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
STATUSES = ("running", "done", "failed", "preempted")
Replace = Literal["nothing", "unfinished", "any"]  # the run that a new one may take the place of

# Every file that the program writes into a run folder; nothing else is ever removed from one.
_EVALUATION = "predictions.csv per_class.csv confused.csv metrics.json confusion_matrix.png reliability.png "
_EVALUATION += "predictions.png embeddings.npy embeddings.png report.html"
_EXPORT = "model.onnx model.*.onnx labels.txt config.json preprocessor_config.json README.md predict.py "
_EXPORT += "export_report.json export_report.failed.json test_data_set_0/input_0.pb test_data_set_0/output_0.pb"
_STATE = "state.safetensors state.json manifest.json"
WRITTEN = {
    "": "run.json config.toml command.txt classes.txt preprocess.json bad_images.txt metrics.csv metrics.jsonl "
    "train.log report.html README.md label_errors.csv reproduction.json digits.png",
    "data/": "manifest.csv",
    "plots/": "curves.png lr.png samples_train.png confusion_matrix.png reliability.png predictions.png embeddings.png",
    "checkpoints/": "best.safetensors calibration.json",
    "checkpoints/step-[0-9]*/": _STATE,
    "checkpoints/.tmp-*/": _STATE,
    "eval/*/": _EVALUATION,
    "explain/*/": "explained.csv sheet.png [0-9][0-9][0-9]*-*.png",
    "export/": _EXPORT,
    ".tmp-export-*/": _EXPORT,
    ".old-*-export/": _EXPORT,
    "hub/": "README.md config.json model.safetensors",
    "tracker/*/": "events.out.tfevents.* hparams.yml",
    "tracker/*/*/": "events.out.tfevents.*",
}
_PATTERNS = [(folder + name).split("/") for folder, names in WRITTEN.items() for name in names.split()]


def write_atomically(file: Path, content: str | bytes) -> None:
    """Put a file in place in one step, durably: temporary file, fsync, rename, fsync of the folder.

    Raises MachineError in one line; whatever stood there before is then still there.
    """
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    temporary = file.with_name(f"{TEMPORARY}{os.getpid()}-{file.name}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as stream:  # never through a link
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise MachineError(f"{file}: cannot be written ({error.strerror})") from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows cannot open a folder, and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """JSON for people to read."""
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV text with lines that end in a newline."""
    cells = [[str(cell) if cell is not None else "" for cell in row] for row in rows]
    # Before Python 3.13 a lone carriage return is not quoted by itself, and cuts the line when it is read.
    odd = any("\r" in cell for row in cells for cell in row)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL)
    writer.writerows([header, *cells])
    return stream.getvalue()


class RunFolder:
    """The folder of one run. On all processes but the main one it is not active: nothing is written."""

    def __init__(self, path: Path, active: bool = True) -> None:
        self.path = path
        self.active = active
        self.plots = path / "plots"
        self.best = path / "checkpoints" / "best.safetensors"
        self.is_open = False  # whether this launch has written into run.json that the run is running
        self._warned = False
        self._lock: FileLock | None = None

    def lock(self) -> None:
        """Keep other processes from writing this run, until `unlock` or the end of this object or process.

        Loader processes that are forked do not hold the lock. Raises UsageError if another process writes the run,
        MachineError if the folder cannot be written.
        """
        if not self.active or self._lock is not None:
            return
        from filelock import FileLock, Timeout  # a tenth of a second to import

        if not os.access(self.path, os.W_OK | os.X_OK):
            raise MachineError(f"{self.path}: the run folder cannot be written")
        # Never the soft lock: its file would outlive a killed process, and lock the run for ever.
        lock = FileLock(self.path / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"{self.path}: another process is writing this run; wait until it ends, or choose another --output-dir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise MachineError(f"{self.path}: the run folder cannot be written ({error.strerror})") from None
            print(f"WARNING: {self.path}: this file system has no locks; start no second run in it", file=sys.stderr)
        self._lock = lock

    def unlock(self) -> None:
        """Let others write this run."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check(self, replace: Replace) -> None:
        """See, before any work is done, that the folder can be made. Raises what `create` would, but for its space."""
        try:
            if not is_free(self.path):
                _check_replaceable(self.path, replace)
            above = existing(self.path)
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be made into a run folder ({error.strerror})") from None
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise MachineError(
                f"{self.path}: cannot be made into a run folder ({above} is not a folder that can be written)"
            )
        self.check_links()

    def check_links(self) -> None:
        """Raises UsageError where a symbolic link would lead what training writes out of the folder."""
        for names in LINKABLE:
            inside(self.path, *names)

    def create(self, replace: Replace, needed_bytes: int, facts: Mapping[str, Any]) -> None:
        """Make the folder, locked, with `facts` as its run.json, if the disk has the space that the run will need.

        Of a run that it replaces, only files that this program wrote are removed. Raises UsageError if the folder is in
        use, MachineError if it cannot be made or the disk is too small; nothing is then made or removed.
        """
        self.check(replace)
        self._check_space(needed_bytes)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.check(replace)  # again: another run may have begun before the lock was ours
            old = list(written_in(self.path))
            # Whenever this is cut off, run.json tells the truth: the old run cannot go on, or the new one has begun.
            _remove(self.path, [file for file in old if file.parent.name.startswith(("step-", TEMPORARY))])
            self.write("run.json", to_json(dict(facts)))
            self.is_open = True
            _remove(self.path, [file for file in old if file != self.path / "run.json"])
            for name in FOLDERS:
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be made into a run folder ({error.strerror})") from None

    def _check_space(self, needed_bytes: int) -> None:
        try:
            usage = shutil.disk_usage(existing(self.path))
            free = usage.free + sum(file.stat().st_size for file in written_in(self.path))
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be made into a run folder ({error.strerror})") from None
        if usage.total and free < needed_bytes:  # some file systems, such as /proc, have no size
            raise MachineError(
                f"{self.path}: needs {needed_bytes >> 20} MiB for checkpoints, the disk has {free >> 20} MiB free"
            )

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the run folder, whole or not at all."""
        if self.active:
            write_atomically(self.path / name, content)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json: the status of the run, and where its facts are."""
        if self.active:
            known = read_facts(self.path) if (self.path / "run.json").exists() else {}
            self.write("run.json", to_json(known | fields))
            self.is_open = self.is_open or fields.get("status") == "running"

    def end(self, status: str, exit_code: int, reason: str) -> None:
        """Record how the run ended, on the process that knows it; the first record stays.

        A run that this launch made "done" can still fail: the page and the pictures are made after that.
        """
        try:
            if read_facts(self.path).get("status") in ("running", "done" if self.is_open else ""):
                RunFolder(self.path).update(status=status, exit_code=exit_code, reason=reason)
        except ResnetDistError as error:
            print(f"WARNING: {error}", file=sys.stderr)

    def append_step(self, row: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(row, allow_nan=False) + "\n")

    def append_epoch(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.csv, after its header where the file is new."""
        text = to_csv(list(row), [list(row.values())])
        is_new = not (self.path / "metrics.csv").exists()
        self._append("metrics.csv", text if is_new else text.partition("\n")[2])

    def cut_back(self, steps: int, epochs: int) -> None:
        """Take out of the metrics files what came after so many optimizer steps and validated epochs.

        It will be done again; so will a last line that a full disk cut off. Raises MachineError.
        """
        if not self.active:
            return
        file = self.path / "metrics.jsonl"
        if file.exists():
            lines = [line for line in _lines(file) if _step_of(line) <= steps]
            self.write("metrics.jsonl", "".join(f"{line}\n" for line in lines))
        file = self.path / "metrics.csv"
        if file.exists():
            header, *rows = _lines(file) or [""]
            names = header.split(",")
            cells = [row.split(",") for row in rows]
            whole = [dict(zip(names, row, strict=True)) for row in cells if len(row) == len(names)]
            kept = [row.values() for row in whole if row.get("epoch", "").isdecimal() and int(row["epoch"]) <= epochs]
            self.write("metrics.csv", "".join(f"{','.join(row)}\n" for row in (names, *kept)))

    def _append(self, name: str, text: str) -> None:
        """Add to a log. One that cannot be written is worth a warning, not the run."""
        if not self.active:
            return
        try:
            append(self.path / name, text)
        except OSError as error:
            if not self._warned:
                print(f"WARNING: {self.path / name}: cannot be written ({error.strerror})", file=sys.stderr)
            self._warned = True


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise MachineError(f"{file}: cannot be read ({error.strerror})") from None


def _step_of(line: str) -> float:
    """The optimizer step of a line of metrics.jsonl; of one that a full disk cut off, infinity."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def append(file: Path, text: str) -> None:
    """Add to a log that is no symbolic link. Raises OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(descriptor, "a", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(text)


def written_in(path: Path) -> Iterator[Path]:
    """The files of a run folder that this program wrote, by their names; no link is one or is followed."""
    for folder, _, names in os.walk(path):
        for file in (Path(folder, name) for name in names):
            parts = file.relative_to(path).parts
            if file.is_file() and not file.is_symlink() and is_written(parts):
                yield file


def is_written(parts: Sequence[str]) -> bool:
    """Whether a path below a run folder is one that this program writes, or the unfinished form of one."""
    *folders, name = parts
    parts = (*folders, UNFINISHED.sub("", name))
    return any(len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in _PATTERNS)


def _remove(path: Path, files: Iterable[Path]) -> None:
    """Remove files below a folder, and the folders that this leaves empty. Raises OSError."""
    for file in files:
        file.unlink(missing_ok=True)
        folder = file.parent
        while folder != path and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def has_state(path: Path) -> bool:
    """Whether a run folder holds a checkpoint to resume from: a folder of that name with a manifest."""
    manifests = (path / "checkpoints").glob(f"step-*/{MANIFEST}")
    return any(STATE_NAME.fullmatch(manifest.parent.name) for manifest in manifests)


def is_run(path: Path) -> bool:
    """Whether a folder is a run of this program, by the content of its run.json: fields that all runs have."""
    try:
        facts = read_facts(path)
    except UsageError:
        return False
    images = facts.get("images")
    return (
        facts.get("status") in STATUSES
        and all(isinstance(facts.get(name), kind) for name, kind in (("epochs", int), ("data_root", str)))
        and isinstance(images, dict)
        and images.keys() == {"train", "val", "test"}
        and not (path / "run.json").is_symlink()
    )


def _check_replaceable(path: Path, replace: Replace) -> None:
    if not is_run(path):
        raise UsageError(f"--output-dir {path}: it exists and is not a run; choose another folder")
    is_done = read_facts(path).get("status") == "done"
    if replace == "nothing" or (replace == "unfinished" and is_done):
        held = "a finished run" if is_done else "a run already"
        raise UsageError(f"--output-dir {path}: it holds {held}; choose another folder, or --overwrite to replace it")


def read_facts(path: Path) -> dict[str, Any]:
    """run.json of a run folder. Raises UsageError where there is none that can be read."""
    file = path / "run.json"
    try:
        facts = parse_json(read_bounded(file, MAX_FACTS))
        if not isinstance(facts, dict):
            raise ValueError("not a JSON object")
        for name, kind in (("status", str), ("epochs", int), ("data_root", str)):
            if not isinstance(facts.get(name, kind()), kind):
                raise ValueError(f"its {name} is not {'text' if kind is str else 'a whole number'}")
    except OSError as error:
        raise UsageError(f"{path}: not a run folder (run.json: {error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{file}: damaged: {error}") from None
    return facts
