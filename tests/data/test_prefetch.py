"""The order of copies, waits and steps, with streams that only write down what they are asked to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from resnet_dist.data.prefetch import copied_ahead
from resnet_dist.data.transforms import Batch


class Stream:
    """A stream that notes the events of the test in one list."""

    noted: list[str] = []  # noqa: RUF012 - one list for all
    current = "main"

    def __init__(self, device: torch.device | str) -> None:
        self.name = "copies" if isinstance(device, torch.device) else device

    def wait_stream(self, other: "Stream") -> None:
        self.noted.append(f"{self.name} waits for {other.name}")


class Tensor:
    def __init__(self, number: int) -> None:
        self.number = number

    def record_stream(self, stream: Stream) -> None:
        Stream.noted.append(f"{self.number} is used by {stream.name}")


class Copied:
    """Stands for a batch: it notes on which stream it is copied."""

    def __init__(self, number: int) -> None:
        self.images = Tensor(number)
        self.tensors = [self.images]

    def to(self, device: torch.device) -> "Copied":
        Stream.noted.append(f"{self.images.number} is copied on {Stream.current}")
        return self


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        Stream.current = stream.name
        yield
        Stream.current = "main"

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    Stream.noted = []
    return Stream.noted


def test_next_batch_is_copied_before_a_step_and_waited_for_after_it(noted: list[str]) -> None:
    for step in copied_ahead([[Copied(number)] for number in (1, 2, 3)], torch.device("cuda", 0)):
        Stream.noted.append(f"step {step[0].images.number}")
    assert Stream.noted == [
        "1 is copied on copies",
        "main waits for copies",
        "1 is used by main",
        "2 is copied on copies",
        "step 1",
        "main waits for copies",
        "2 is used by main",
        "3 is copied on copies",
        "step 2",
        "main waits for copies",
        "3 is used by main",
        "step 3",
    ]


def test_no_step_gives_none(noted: list[str]) -> None:
    assert list(copied_ahead([], torch.device("cuda", 0))) == []


def test_on_a_cpu_each_batch_comes_as_it_is_and_when_it_is_asked_for() -> None:
    made: list[int] = []

    def steps() -> Iterator[list[Batch]]:
        for number in range(3):
            made.append(number)
            yield [Batch(*[torch.tensor([number])] * 4)]

    for number, step in enumerate(copied_ahead(steps(), torch.device("cpu"))):
        assert int(step[0].images) == number
        assert made == list(range(number + 1))
