"""Micro-batching: images of different requests go through the network together."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from export.predict import Row

T = TypeVar("T")
Waiting = tuple[np.ndarray, "asyncio.Future[Row]"]


class Batcher:
    """Decodes images in several threads, and runs the network for batches of them in one thread.

    A batch has at most `max_batch` images. It starts as soon as the network is free and no image is being decoded, or
    after `max_wait` seconds: a client that is alone never waits. All methods belong to one event loop.
    """

    def __init__(
        self,
        infer: Callable[[np.ndarray], Iterable[Row]],
        threads: int,
        max_batch: int,
        max_wait: float,
        on_batch: Callable[[int], None],
    ) -> None:
        """`infer` takes uint8 (B, H, W, 3); `on_batch` is called with the size of every batch."""
        self._infer, self._max_batch, self._max_wait, self._on_batch = infer, max_batch, max_wait, on_batch
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self._decoding = 0
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self._network = ThreadPoolExecutor(1, "network")

    async def decoded(self, decode: Callable[[], T]) -> T:
        """Call `decode` in a thread. Batches wait for it, for `max_wait` seconds at most."""
        self._decoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, decode)
        finally:
            self._decoding -= 1

    async def row(self, pixels: np.ndarray) -> Row:
        """The network's result for uint8 (H, W, 3), as part of a batch. Raises what `infer` raises."""
        result: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((pixels, result))
        return await result

    async def work(self) -> None:
        """Run batches until cancelled."""
        while True:
            batch = await self._next()
            pixels = np.stack([image for image, _ in batch])
            self._on_batch(len(batch))
            loop = asyncio.get_running_loop()
            done = loop.run_in_executor(self._network, lambda: list(self._infer(pixels)))  # noqa: B023 - ended below
            await asyncio.wait([done])
            for position, (_, result) in enumerate(batch):
                if result.cancelled():
                    continue
                if (error := done.exception()) is not None:
                    result.set_exception(error)
                else:
                    result.set_result(done.result()[position])

    async def _next(self) -> list[Waiting]:
        batch = [await self._queue.get()]
        end = asyncio.get_running_loop().time() + self._max_wait
        while len(batch) < self._max_batch and (self._decoding or not self._queue.empty()):
            try:
                async with asyncio.timeout_at(end):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
        return batch

    def close(self) -> None:
        """End the threads."""
        self._decoders.shutdown()
        self._network.shutdown()
