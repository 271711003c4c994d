"""Micro-batching, with a network that only counts."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from export.predict import Row
from export.serve.batching import Batcher

SLOW = 0.05  # seconds


def image(number: int) -> np.ndarray:
    return np.full((1, 1, 3), number, np.uint8)


class Network:
    """The logit of an image is its first value; -> the sizes of its batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.sizes, self.running = seconds, list[int](), threading.Lock()

    def __call__(self, pixels: np.ndarray) -> Iterator[Row]:
        assert self.running.acquire(blocking=False), "one batch at a time"
        self.sizes.append(len(pixels))
        time.sleep(self.seconds)
        self.running.release()
        if 255 in pixels:
            raise ValueError("255")
        return iter([(one[0, 0, :1], one[0, 0, :1], None) for one in pixels])


@contextmanager
def running(network: Network, max_batch: int = 4, max_wait: float = 10.0) -> Iterator[Batcher]:
    batcher = Batcher(network, 2, max_batch, max_wait, on_batch=lambda size: None)
    yield batcher
    batcher.close()


def run(batcher: Batcher, requests: Callable[[], Awaitable[object]]) -> None:
    async def all_of_it() -> None:
        work = asyncio.create_task(batcher.work())
        async with asyncio.timeout(20):
            await requests()
        work.cancel()

    asyncio.run(all_of_it())


def test_images_that_wait_share_a_batch() -> None:
    network = Network(SLOW)

    async def requests() -> None:
        rows = await asyncio.gather(*(batcher.row(image(number)) for number in range(10)))
        assert [int(logits[0]) for logits, _, _ in rows] == list(range(10)), "each gets its own"

    with running(network) as batcher:
        run(batcher, requests)
    assert sum(network.sizes) == 10 and max(network.sizes) == 4 and len(network.sizes) == 3


def test_an_image_that_is_alone_does_not_wait() -> None:
    async def requests() -> None:
        began = time.monotonic()
        for number in range(20):
            await batcher.decoded(lambda: None)
            await batcher.row(image(number))
        assert time.monotonic() - began < 5

    with running(Network()) as batcher:
        run(batcher, requests)


@pytest.mark.parametrize(("max_wait", "sizes"), [(10.0, [2]), (0.0, [1, 1]), (SLOW, [1, 1])])
def test_a_batch_waits_for_images_that_are_decoded(max_wait: float, sizes: list[int]) -> None:
    network = Network()

    async def slowly() -> None:
        await batcher.decoded(lambda: time.sleep(0.5))
        await batcher.row(image(1))

    async def quickly() -> None:
        await asyncio.sleep(0.1)
        await batcher.row(image(2))

    async def requests() -> None:
        await asyncio.gather(slowly(), quickly())

    with running(network, max_wait=max_wait) as batcher:
        run(batcher, requests)
    assert network.sizes == sizes


def test_an_error_of_the_network_ends_only_its_batch() -> None:
    async def requests() -> None:
        first, second = await asyncio.gather(batcher.row(image(1)), batcher.row(image(255)), return_exceptions=True)
        assert isinstance(first, ValueError) and isinstance(second, ValueError)
        assert int((await batcher.row(image(3)))[0][0]) == 3

    with running(Network()) as batcher:
        run(batcher, requests)


def test_who_gave_up_does_not_disturb_the_others() -> None:
    async def requests() -> None:
        leaving = asyncio.create_task(batcher.row(image(1)))
        staying = asyncio.create_task(batcher.row(image(2)))
        await asyncio.sleep(SLOW / 2)
        leaving.cancel()
        assert int((await staying)[0][0]) == 2

    with running(Network(SLOW)) as batcher:
        run(batcher, requests)
