"""The options of `resnet-dist serve`, and how it starts."""

import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from resnet_dist.config.fields import option, out_of_range
from resnet_dist.errors import MachineError, UsageError

MAX_PIXELS, MAX_MIB = 64_000_000, 512  # of `predict`, which help does not import
BACKLOG = 2048  # connections that wait to be accepted


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer HTTP requests with the classes of images, without torch. Needs `pip install 'resnet-dist[serve]'`."""

    model: str | None = option(None, positional=True)
    """A .onnx file, or an exported run folder."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 lets other machines connect. There is neither a password nor encryption."""
    port: int = 8000
    """The port to listen on; 0: any free one."""
    top_k: int = 5
    """Number of classes per image, if a request does not ask for another with ?top_k=N."""
    max_batch: int = 16
    """The most images that go through the network together, also from different requests; never more than --queue."""
    max_wait: float = 5.0
    """The most milliseconds that an image waits for images that are being decoded, to share a batch with them."""
    queue: int = 128
    """The most images in work at a time, and the most of one request. A request beyond it is answered with 503."""
    max_mib: float = 16.0
    """The largest body of a request in MiB; a larger one is answered with 413."""
    max_pixels: int = MAX_PIXELS
    """The most pixels of an image."""
    threads: int | None = None
    """CPU threads for the network, and as many for decoding (default: all cores)."""
    providers: str = "auto"
    """onnxruntime providers, such as cuda,cpu."""

    @property
    def batch(self) -> int:
        """The size of the largest batch."""
        return min(self.max_batch, self.queue)

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        if self.model is None:
            yield "MODEL is missing: a .onnx file or an exported run folder"
        yield from out_of_range(self, 0, 65535, "port")
        yield from out_of_range(self, 1, math.inf, "top_k", "max_batch", "queue", "threads")
        yield from out_of_range(self, 0, 1000, "max_wait")
        yield from out_of_range(self, 0, MAX_MIB, "max_mib", open_low=True)
        yield from out_of_range(self, 1, MAX_PIXELS, "max_pixels")


def run_serve(cfg: ServeConfig, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests that have begun are answered first.

    `say` is called with one line when the server is ready. Before that it raises UsageError, MachineError or
    ArtifactError.
    """
    try:
        from export.serve.server import serve
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install 'resnet-dist[serve]'") from None
    with listening(cfg.host, cfg.port) as listener:
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        serve(cfg, listener, lambda model: say(f"{model}, on http://{host}:{listener.getsockname()[1]}"))


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Raises MachineError if the address is in use or not of this machine."""
    wanted = {"type": socket.SOCK_STREAM, "proto": socket.IPPROTO_TCP, "flags": socket.AI_PASSIVE}
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, **wanted)[0]
        listener = socket.socket(family, kind, protocol)  # without the protocol, asyncio leaves Nagle's delay on
    except OSError as error:
        raise _not_there(host, port, error) from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise _not_there(host, port, error) from None
        yield listener


def _not_there(host: str, port: int, error: OSError) -> MachineError:
    return MachineError(f"--host {host} --port {port}: cannot listen there ({error.strerror})")
