"""Counters in the text format of Prometheus."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """Counts values by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The cumulative counts, the sum and the count."""
        below = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.sum!r}"
        yield f"{name}_count {below}"


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()  # by status
        self.seconds = Histogram(SECONDS)
        self.batches = Histogram(SIZES)
        self.images: Counter[str] = Counter({"classified": 0, "unusable": 0})

    def text(self, in_work: int, ready: bool) -> str:
        """All metrics. `in_work`: images that were accepted and are not answered yet."""
        return "".join(f"{line}\n" for line in self._lines(in_work, ready))

    def _lines(self, in_work: int, ready: bool) -> Iterator[str]:
        yield from _about("requests_total", "counter", "Requests to /predict by status of the answer.")
        for status, count in sorted(self.requests.items()):
            yield f'resnet_dist_requests_total{{status="{status}"}} {count}'
        yield from _about("images_total", "counter", "Images by result.")
        for result, count in sorted(self.images.items()):
            yield f'resnet_dist_images_total{{result="{result}"}} {count}'
        yield from _about("request_seconds", "histogram", "Seconds from the head of a request to that of its answer.")
        yield from self.seconds.lines("resnet_dist_request_seconds")
        yield from _about("batch_images", "histogram", "Images in a batch.")
        yield from self.batches.lines("resnet_dist_batch_images")
        yield from _about("images_in_work", "gauge", "Images that were accepted and are not answered yet.")
        yield f"resnet_dist_images_in_work {in_work}"
        yield from _about("ready", "gauge", "1 if the server is warm and not stopping.")
        yield f"resnet_dist_ready {int(ready)}"


def _about(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP resnet_dist_{name} {text}", f"# TYPE resnet_dist_{name} {kind}"
