"""Signals: a signal to the launcher or to any process stops every process after the same step.

During training a signal only sets a flag, and the loop saves a checkpoint. Before the first step a signal ends the
process at once. The request is sent over a separate gloo group, with a delay of one call, so that no process waits for
its device or for another process.
"""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, ClassVar

from resnet_dist.errors import MachineError
from resnet_dist.runtime import environment as launcher

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if hasattr(signal, name))  # Windows has the first two
SECONDS_TO_LEAVE = 5.0  # for a process that has not started to train
SECONDS_TO_SAVE = 10.0  # for a process whose launcher ended: nothing else would end it if it hangs
POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


class StopRequested(Exception):  # noqa: N818 - not an error: what the loop catches to save and leave
    """Raised in every process at the same point if any process got a signal to stop."""


class Stopped(KeyboardInterrupt):
    """A signal came before the first step: this process ends at once. `number` is the signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name} before the first step")


class StopRequests:
    """The stop requests of all processes, combined into one decision.

    Every process calls `check` at the same points (after each optimizer step, before each evaluation batch), with the
    same result. If a process does not react to a signal and is ended, another thread first calls `on_exit`, if set,
    with the exit code and the reason. `last_words` is what a second signal shows before it ends the process.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_read = False  # by a loop, which saves a checkpoint
        self.on_exit: Callable[[int, str], None] | None = None
        self.last_words = ""
        self._since = 0.0
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None

    def connect(self, minutes: float) -> None:
        """Share requests with the other processes from now on; every process calls this.

        A process that does not answer for this many minutes counts as lost (RuntimeError).
        """
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))

    def note(self, number: int, _: FrameType | None = None) -> None:
        """The signal handler: note the first signal; exit at once on another one more than a second later.

        Raises Stopped if no loop checks the requests yet.
        """
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            if not self.is_read:
                raise Stopped(number)
        elif time.monotonic() - self._since > 1:
            if launcher.rank() == 0:
                os.write(2, os.fsencode(self.last_words))  # print could be interrupted here and lock
            os._exit(128 + number)

    def check(self) -> None:
        """Raise StopRequested if any process got a signal; for other processes with a delay of one call."""
        self.is_read = True
        if self._group is None:
            if self.signal is not None:
                raise StopRequested
            return
        if self.finish():
            raise StopRequested
        import torch
        import torch.distributed as dist

        flag = torch.tensor([self.signal is not None], dtype=torch.int32)
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)

    def pulse(self) -> Callable[[], None]:
        """Start to watch the other processes; every process calls this at the same point.

        Returns a function to call while this process waits for its device. It raises RuntimeError if another process
        has ended, and never waits.
        """
        if self._group is None:
            return lambda: None
        import torch
        import torch.distributed as dist

        beat = torch.zeros(1, dtype=torch.int32)
        work: Any = dist.all_reduce(beat, group=self._group, async_op=True)

        def look() -> None:
            if work.is_completed():
                work.wait()

        return look

    def finish(self) -> bool:
        """Whether the last call to `check` found a request."""
        if self._pending is None:
            return False
        work, flag = self._pending
        self._pending = None
        work.wait()
        return bool(flag.item())


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """In this context, signals are handled as stop requests. When it ends, the earlier handlers are restored.

    In a launched process the handlers stay, so that a launcher that ends the job does not cut off the last messages. If
    such a process trains again, the same watcher serves the new requests; a signal in between raises Stopped. In other
    threads than the main thread nothing is installed, because only the main thread can handle signals. Raises
    MachineError on Windows, which has neither these signals nor process groups.
    """
    if not hasattr(signal, "SIGHUP"):
        raise MachineError("training does not work on Windows; use Linux, or Linux in WSL 2")
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    is_launched = launcher.is_distributed()
    ours = [number for number in SIGNALS if signal.getsignal(number) is not None]  # otherwise it could not be restored
    before = {number: signal.signal(number, requests.note) for number in ours}
    watcher = Watcher.kept if is_launched else None
    if watcher is None:
        watcher = Watcher(requests)
        watcher.start()
    elif watcher.requests.signal is not None:
        raise Stopped(watcher.requests.signal)
    watcher.requests = requests
    try:
        yield requests
    finally:
        requests.on_exit = None  # the run that it would record has ended
        if is_launched:
            Watcher.kept = watcher
        else:
            watcher.stop()
            for number, handler in before.items():
                signal.signal(number, handler)


class Watcher(threading.Thread):
    """Ends this process if it cannot react to a signal, for example while a library waits for other processes.

    Before the first step it has SECONDS_TO_LEAVE. In training it has as long as its launcher gives it, or
    SECONDS_TO_SAVE if the launcher has ended.
    """

    kept: ClassVar["Watcher | None"] = None  # the watcher of a launched process, after its first training

    def __init__(self, requests: StopRequests) -> None:
        super().__init__(name="stop requests", daemon=True)
        self.requests = requests
        self.parent = os.getppid() if launcher.has_launcher() else None
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # Signals are written to the pipe at once, even if the main thread is not running Python code.
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)

    def run(self) -> None:
        """Wait for signals and for the end of the launcher."""
        number, since = 0, 0.0
        while True:
            if select.select([self._reading], [], [], POLL_SECONDS)[0]:
                received = os.read(self._reading, 64)
                if b"\0" in received:  # not a signal: from `stop`
                    return
                numbers = [byte for byte in received if byte in SIGNALS]
                if numbers and not number:
                    number, since = numbers[0], time.monotonic()
            orphaned = self.parent is not None and os.getppid() != self.parent
            if orphaned and not number:  # on Linux the kernel has already sent the signal
                number, since = (
                    int(signal.SIGTERM),
                    time.monotonic(),
                )  # only once: a second signal ends the process at once
                os.kill(os.getpid(), number)
            is_ending = number and (orphaned or not self.requests.is_read)
            limit = SECONDS_TO_SAVE if self.requests.is_read else SECONDS_TO_LEAVE
            if is_ending and time.monotonic() - since > limit:
                self.leave(number, orphaned)

    def leave(self, number: int, orphaned: bool) -> None:
        """End this process and its child processes, even if its main thread is waiting."""
        reason = "the launcher ended" if orphaned else f"stopped by {signal.Signals(number).name} before the first step"
        try:
            if (on_exit := self.requests.on_exit) is not None:
                on_exit(128 + number, reason)
        finally:
            if orphaned and os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)
            os._exit(128 + number)

    def stop(self) -> None:
        """End the thread. On the main thread."""
        signal.set_wakeup_fd(self._before)
        os.write(self._writing, b"\0")
        self.join()
        os.close(self._reading)
        os.close(self._writing)


def end_with_launcher() -> None:
    """Let this process end when its launcher ends for any reason. Call it before slow imports.

    Until `stop_requests` handles it, the signal that Linux sends then ends the process at once.
    """
    if launcher.is_orphan():
        os.kill(os.getpid(), signal.SIGTERM)
    if launcher.has_launcher():
        die_with_parent(signal.SIGTERM)


def die_with_parent(number: int) -> None:
    """Ask Linux for a signal when the parent ends for any reason, so that a killed launcher leaves no process behind.

    Does nothing on other systems.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # the parent ended in between
        os.kill(os.getpid(), number)


def shield_loader(_: int) -> None:
    """Called at the start of a loader process: ignore the signals that the training process handles, but end with it.

    A launcher signals the whole process group. Without loader processes no checkpoint could be saved.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
