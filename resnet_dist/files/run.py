"""The run folder: its files, its lock, and atomic writes."""

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
STATE_NAME = re.compile(r"step-\d{9,}(\.replaced\d*)?")  # name of the folder of a checkpoint to resume from
MANIFEST = "manifest.json"  # in such a folder: written last, removed first
UNFINISHED = re.compile(r"^\.tmp-\d+-")  # prefix of a file that is being written
FOLDERS = ("checkpoints", "plots", "data")
# The folders that training writes to.
LINKABLE = (*((name,) for name in FOLDERS), ("eval",), ("eval", "val"), ("tracker",))
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
STATUSES = ("running", "done", "failed", "preempted")
Replace = Literal["nothing", "unfinished", "any"]  # which run a new one may replace

# Every file that the program writes into a run folder; no other file is ever removed.
_EVALUATION = "predictions.csv per_class.csv confused.csv metrics.json confusion_matrix.png reliability.png "
_EVALUATION += "predictions.png embeddings.npy embeddings.png report.html"
_EXPORT = "model.onnx model.*.onnx model.openvino.xml model.openvino.bin labels.txt config.json "
_EXPORT += "preprocessor_config.json README.md predict.py "
_EXPORT += "export_report.json export_report.failed.json test_data_set_0/input_0.pb test_data_set_0/output_0.pb "
_EXPORT += "web/index.html web/style.css web/page.js web/worker.js web/pixels.js web/scores.js web/model.json "
_EXPORT += "web/model.onnx web/model.int8.onnx web/onnxruntime-web.js web/ort-wasm-simd-threaded.wasm "
_EXPORT += "web/onnxruntime-web-LICENSE.txt gate.json "
_EXPORT += "triton/*/config.pbtxt triton/*/labels.txt triton/*/1/model.onnx"
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
    "hub/onnx/": "model.onnx config.json preprocessor_config.json",
    "tracker/*/": "events.out.tfevents.* hparams.yml",
    "tracker/*/*/": "events.out.tfevents.*",
}
_PATTERNS = [(folder + name).split("/") for folder, names in WRITTEN.items() for name in names.split()]


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file atomically and durably: temporary file, fsync, rename, fsync of the folder.

    Raises MachineError; an existing file is then unchanged.
    """
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    temporary = file.with_name(f"{TEMPORARY}{os.getpid()}-{file.name}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as stream:  # "x": never through a link
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
    """Make a rename in `folder` durable. Windows cannot open a folder and does not need this."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV text; lines end with a newline character."""
    cells = [[str(cell) if cell is not None else "" for cell in row] for row in rows]
    # Before Python 3.13, csv does not quote a lone carriage return, which then ends the row for a reader.
    quote_all = any("\r" in cell for row in cells for cell in row)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerows([header, *cells])
    return stream.getvalue()


class RunFolder:
    """The folder of one run. It is active (written to) on the main process only."""

    def __init__(self, path: Path, active: bool = True) -> None:
        self.path = path
        self.active = active
        self.plots = path / "plots"
        self.best = path / "checkpoints" / "best.safetensors"
        self.is_open = False  # whether this launch has set the status in run.json to "running"
        self._warned = False
        self._lock: FileLock | None = None

    def lock(self) -> None:
        """Lock the run for this process until `unlock`, or until this object or process ends.

        Forked loader processes do not hold the lock. Raises UsageError if another process writes the run, MachineError
        if the folder cannot be written.
        """
        if not self.active or self._lock is not None:
            return
        from filelock import FileLock, Timeout  # it takes a tenth of a second to import

        if not os.access(self.path, os.W_OK | os.X_OK):
            raise MachineError(f"{self.path}: the run folder cannot be written")
        # Never the soft lock: its file would outlive a killed process and lock the run forever.
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
            print(
                f"WARNING: {self.path}: this file system has no locks; do not start a second run in this folder",
                file=sys.stderr,
            )
        self._lock = lock

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check(self, replace: Replace) -> None:
        """Check, before any work, that the folder can be created. Raises as `create` does, except for disk space."""
        try:
            if not is_free(self.path):
                _check_replaceable(self.path, replace)
            parent = existing(self.path)
        except OSError as error:
            raise MachineError(f"{self.path}: the run folder cannot be created ({error.strerror})") from None
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise MachineError(f"{self.path}: the run folder cannot be created ({parent} is not a writable folder)")
        self.check_links()

    def check_links(self) -> None:
        """Raise UsageError if training would write through a symbolic link."""
        for names in LINKABLE:
            inside(self.path, *names)

    def create(self, replace: Replace, needed_bytes: int, facts: Mapping[str, Any]) -> None:
        """Create and lock the folder, and write `facts` to run.json, if the disk has `needed_bytes` free.

        If it replaces a run, only files that this program wrote are removed. Raises UsageError if the folder is in use,
        and MachineError if it cannot be created or the disk is too small; then nothing is created or removed.
        """
        self.check(replace)
        self._check_space(needed_bytes)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.check(replace)  # check again: another run may have started before the lock was acquired
            old = list(written_in(self.path))
            # Even after an interruption run.json is correct: the old run cannot be resumed, or the new run has started.
            _remove(self.path, [file for file in old if file.parent.name.startswith(("step-", TEMPORARY))])
            self.write("run.json", to_json(dict(facts)))
            self.is_open = True
            _remove(self.path, [file for file in old if file != self.path / "run.json"])
            for name in FOLDERS:
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise MachineError(f"{self.path}: the run folder cannot be created ({error.strerror})") from None

    def _check_space(self, needed_bytes: int) -> None:
        try:
            usage = shutil.disk_usage(existing(self.path))
            free = usage.free + sum(file.stat().st_size for file in written_in(self.path))
        except OSError as error:
            raise MachineError(f"{self.path}: the run folder cannot be created ({error.strerror})") from None
        if usage.total and free < needed_bytes:  # some file systems, such as /proc, report no size
            raise MachineError(
                f"{self.path}: the checkpoints need {needed_bytes >> 20} MiB, the disk has only {free >> 20} MiB free"
            )

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the run folder atomically."""
        if self.active:
            write_atomically(self.path / name, content)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json."""
        if self.active:
            facts = read_facts(self.path) if (self.path / "run.json").exists() else {}
            self.write("run.json", to_json(facts | fields))
            self.is_open = self.is_open or fields.get("status") == "running"

    def end(self, status: str, exit_code: int, reason: str) -> None:
        """Record how the run ended. Any process may call this; only the first call has an effect.

        A run that this launch marked "done" can still fail while the report is written.
        """
        try:
            if read_facts(self.path).get("status") in ("running", "done" if self.is_open else ""):
                RunFolder(self.path).update(status=status, exit_code=exit_code, reason=reason)
        except ResnetDistError as error:
            print(f"WARNING: {error}", file=sys.stderr)

    def append_step(self, row: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(row, allow_nan=False) + "\n")

    def append_epoch(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.csv, after a header if the file is new."""
        text = to_csv(list(row), [list(row.values())])
        is_new = not (self.path / "metrics.csv").exists()
        self._append("metrics.csv", text if is_new else text.partition("\n")[2])

    def cut_back(self, steps: int, epochs: int) -> None:
        """Remove rows after this optimizer step and this epoch from the metrics files; training will repeat them.

        An incomplete last line (after a full disk) is removed too. Raises MachineError.
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
            rest = [row.values() for row in whole if row.get("epoch", "").isdecimal() and int(row["epoch"]) <= epochs]
            self.write("metrics.csv", "".join(f"{','.join(row)}\n" for row in (names, *rest)))

    def _append(self, name: str, text: str) -> None:
        """Append to a log. If that fails, warn once and continue."""
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
    """The optimizer step of a line of metrics.jsonl; infinity for an incomplete line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def append(file: Path, text: str) -> None:
    """Append to a file that is not a symbolic link. Raises OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(descriptor, "a", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(text)


def written_in(path: Path) -> Iterator[Path]:
    """The files of a run folder that this program wrote, recognised by name. Links are not followed."""
    for folder, _, names in os.walk(path):
        for file in (Path(folder, name) for name in names):
            parts = file.relative_to(path).parts
            if file.is_file() and not file.is_symlink() and is_written(parts):
                yield file


def is_written(parts: Sequence[str]) -> bool:
    """Whether this program writes a file with this path in a run folder, including unfinished files."""
    *folders, name = parts
    parts = (*folders, UNFINISHED.sub("", name))
    return any(len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in _PATTERNS)


def _remove(path: Path, files: Iterable[Path]) -> None:
    """Remove files inside a folder, and subfolders that become empty. Raises OSError."""
    for file in files:
        file.unlink(missing_ok=True)
        folder = file.parent
        while folder != path and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def has_state(path: Path) -> bool:
    """Whether a run folder has a checkpoint to resume from, complete with its manifest."""
    manifests = (path / "checkpoints").glob(f"step-*/{MANIFEST}")
    return any(STATE_NAME.fullmatch(manifest.parent.name) for manifest in manifests)


def is_run(path: Path) -> bool:
    """Whether a folder is a run of this program: its run.json has the fields that all runs have."""
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
        content = "a finished run" if is_done else "a run"
        raise UsageError(
            f"--output-dir {path}: it contains {content}; choose another folder, or give --overwrite to replace it"
        )


def identity(facts: Mapping[str, Any]) -> str:
    """Model, recipe, data and date of a run, from its run.json: `resnet18, recipe bn-only, data photos, 2026-05-31`.

    The date is that of the last launch in UTC; runs of older versions have none.
    """
    launch = (facts.get("launches") or [{}])[-1]
    parts = [
        str(facts.get("model") or ""),
        f"recipe {facts.get('recipe') or 'none'}",
        f"data {Path(str(facts.get('data_root', ''))).name}",
        str(launch.get("started", ""))[:10],
    ]
    return ", ".join(part for part in parts if part)


def read_facts(path: Path) -> dict[str, Any]:
    """The content of run.json. Raises UsageError if it is missing or damaged."""
    file = path / "run.json"
    try:
        facts = parse_json(read_bounded(file, MAX_FACTS))
        if not isinstance(facts, dict):
            raise ValueError("not a JSON object")
        for name, kind in (("status", str), ("epochs", int), ("data_root", str)):
            if not isinstance(facts.get(name, kind()), kind):
                raise ValueError(f"{name} must be {'text' if kind is str else 'an integer'}")
    except OSError as error:
        raise UsageError(f"{path}: not a run folder (run.json: {error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{file}: damaged: {error}") from None
    return facts
