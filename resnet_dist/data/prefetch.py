"""The batches of the next step are copied to the GPU while a step computes."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from resnet_dist.data.transforms import Batch


def copied_ahead(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The micro-batches of each step, on the device if it is a GPU. On a CPU they come as they are.

    The copy runs on a stream of its own, next to the kernels of the step before, which the caller has started by then.
    The caller's stream waits for the copy of a step when that step begins, but never for the copy of the next one.
    """
    if device.type != "cuda":
        yield from steps
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: list[Batch] | None = None
    for batches in steps:
        with torch.cuda.stream(stream):
            copied = [batch.to(device) for batch in batches]
        if ready is not None:
            yield ready
        _hand_over(copied, stream, torch.cuda.current_stream(device))
        ready = copied
    if ready is not None:
        yield ready


def _hand_over(batches: Sequence[Batch], stream: torch.cuda.Stream, user: torch.cuda.Stream) -> None:
    """Let `user` wait for what `stream` copied, and the allocator keep the memory until `user` is done with it."""
    user.wait_stream(stream)
    for batch in batches:
        for tensor in batch.tensors:
            tensor.record_stream(user)
