"""What is on disk for a run, and how it gets there: whole or not at all."""

import csv
import errno
import fcntl
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_dist.errors import MachineError, ResnetDistError, UsageError
from resnet_dist.reading import parse_json, read_bounded

FORMAT_VERSION = 1
MAX_FACTS = 1 << 24  # bytes of run.json
LOCK = ".lock"  # a file of a run folder that whoever writes the run holds locked


def write_atomically(file: Path, content: str | bytes) -> None:
    """Put a file in place in one step, durably: temporary file, fsync, rename, fsync of the folder.

    Raises MachineError in one line; whatever stood there before is then still there.
    """
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(f"{file}: cannot be written ({error.strerror})") from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
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
        self._warned = False
        self._lock: int | None = None

    def lock(self) -> None:
        """Keep other processes from writing this run, until `unlock` or the end of this process, whatever ends it.

        Raises UsageError where another process writes it, MachineError where it cannot be written.
        """
        if not self.active or self._lock is not None:
            return
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise MachineError(f"{self.path}: the run folder cannot be written")
        try:
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            # Not flock: loader processes would inherit it, and hold it longer than their training process lives.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                print(f"WARNING: {self.path}: no locks here; see that only one process writes it", file=sys.stderr)
                return
            is_open = self._lock is not None
            self.unlock()
            if is_open:
                raise UsageError(
                    f"{self.path}: another process writes this run; wait for its end, or choose another --output-dir"
                ) from None
            raise MachineError(f"{self.path}: the run folder cannot be written ({error.strerror})") from None

    def unlock(self) -> None:
        """Let others write this run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self, overwrite: bool) -> None:
        """See, before any work is done, that the folder can be made. Raises what `create` would."""
        try:
            if _is_used(self.path):
                _check_replaceable(self.path, overwrite)
            above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be made into a run folder ({error.strerror})") from None
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise MachineError(
                f"{self.path}: cannot be made into a run folder ({above} is not a folder that can be written)"
            )

    def create(self, overwrite: bool, needed_bytes: int) -> None:
        """Make the folder, locked, with the space that the run will need.

        Raises UsageError if the folder is in use (with `overwrite`: by anything but a run), MachineError if it cannot
        be made or the disk is too small.
        """
        self.check(overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.check(overwrite)  # again: another run may have begun before the lock was ours
            for entry in _entries(self.path):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            for name in ("checkpoints", "plots", "data"):
                (self.path / name).mkdir()
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be made into a run folder ({error.strerror})") from None
        if free < needed_bytes:
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

    def end(self, status: str, exit_code: int, reason: str) -> None:
        """Record how the run ended, on whichever process knows it; the first one to say so is believed."""
        try:
            if read_facts(self.path).get("status") == "running":
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
            with (self.path / name).open("a", newline="", encoding="utf-8", errors="surrogateescape") as stream:
                stream.write(text)
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


def _entries(path: Path) -> list[Path]:
    """What is in a folder, apart from the lock."""
    return [entry for entry in path.iterdir() if entry.name != LOCK]


def _is_used(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or bool(_entries(path)))


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not (path.is_dir() and (path / "run.json").exists()):
        raise UsageError(f"--output-dir {path}: it exists and is not a run; choose another folder")
    if not overwrite:
        raise UsageError(
            f"--output-dir {path}: it holds a run already; choose another folder, or --overwrite to replace it"
        )


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
