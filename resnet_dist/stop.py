"""Stopping in step: a signal to the launcher, to one process or to all makes every process stop after the same step.

Handlers only set a flag; the work is done by the loop. The request travels over a gloo group of its own on the hosts,
one call behind, so that no process waits for its device or for another process because of it.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

from resnet_dist import launcher

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class StopRequested(Exception):  # noqa: N818 - not an error: what the loop catches to save and leave
    """Every process is to stop here."""


class StopRequests:
    """The stop requests of all processes, made one decision.

    `check` is called by every process at the same points (after each optimizer step, before each batch of an
    evaluation); what it says is the same for all of them.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None

    def connect(self, minutes: float) -> None:
        """Share the requests with the other processes from now on; every process calls this.

        One that is waited for longer than so many minutes is taken as lost (RuntimeError).
        """
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))

    def note(self, number: int, _: FrameType | None = None) -> None:
        """The signal handler: remember the first; leave at once on another that comes over a second later."""
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 1:
            os._exit(128 + number)

    def check(self) -> None:
        """Raise StopRequested if any process was asked to stop; of another process this is known one call later."""
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
    """Within it, signals to stop are requests; after it, the handlers that were there before are back.

    Not in a launched process, which ends then: a launcher that ends the others must not cut off what it has to say.
    """
    requests = StopRequests()
    before = {number: signal.signal(number, requests.note) for number in SIGNALS}
    if launcher.is_distributed():
        die_with_parent(signal.SIGTERM)
    try:
        yield requests
    finally:
        if not launcher.is_distributed():
            for number, handler in before.items():
                signal.signal(number, handler)


def die_with_parent(number: int) -> None:
    """Ask Linux for a signal when the parent ends, however it ends: a killed launcher then leaves nobody behind.

    Elsewhere than on Linux nothing is done.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), number)


def shield_loader(_: int) -> None:
    """Start of a loader process: outlive the signals that its training process handles, but not that process.

    A launcher signals the whole process group; a loader that died of it would take the checkpoint with it.
    """
    os.setpgid(0, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
