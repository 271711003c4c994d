"""Estimate how a measured training step would scale to larger clusters: a simulation, not a measurement.

Every GPU computes its step; DDP sums the gradients in buckets while the backward pass still runs. Two things cost time:
the all-reduces that are not done when the backward pass ends, and waiting for the slowest GPU of each step. The
simulation leaves out loading images, evaluation, and all-reduces over trees, which NCCL may choose among many nodes. It
agrees with published efficiencies of ResNet-50 on 8 to 256 GPUs within five points
(tests/bench/test_scaling_estimate.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

GPUS = (8, 64, 512)
BUCKET = 25 << 20  # bytes, DDP's default


@dataclass(frozen=True)
class Step:
    """A training step of one GPU, without any all-reduce.

    Attributes:
        seconds: duration of the whole step.
        gradient_bytes: size of the gradients that all GPUs sum.
        backward: share of the backward pass in the duration, 0..1.
        jitter: standard deviation of the duration over GPUs and steps, relative to its mean. With 2 % the estimate is
            96 % for eight V100s, as in PyTorch's own DDP benchmark.
    """

    seconds: float
    gradient_bytes: int
    backward: float = 2 / 3
    jitter: float = 0.02


@dataclass(frozen=True)
class Link:
    """A connection: the bytes per second that it really transfers, and the seconds until one message arrives."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs: the link from a node to the others, and the links between the GPUs of a node."""

    between: Link
    within: Link = Link(130e9, 5e-6)  # about half of what NVLink of an A100 can do
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Estimate:
    """A step on many GPUs.

    Attributes:
        gpus: number of GPUs.
        seconds: duration of the step.
        all_reduce: seconds of all all-reduces, hidden behind the backward pass or not.
        exposed: seconds of the all-reduces after the backward pass, in which the GPUs wait.
        efficiency: speed per GPU relative to one GPU, 0..1.
    """

    gpus: int
    seconds: float
    all_reduce: float
    exposed: float
    efficiency: float


def estimate(step: Step, cluster: Cluster, gpus: int) -> Estimate:
    """Estimate a step on this number of GPUs. Raises ValueError if it is below 1."""
    if gpus < 1:
        raise ValueError(f"a cluster has at least 1 GPU, not {gpus}")
    slowest = step.seconds * (1 + step.jitter * _largest_of(gpus))
    sums = [ring_seconds(size, cluster, gpus) for size in buckets(step.gradient_bytes)]
    exposed = _exposed(slowest * step.backward, sums)
    return Estimate(gpus, slowest + exposed, sum(sums), exposed, step.seconds / (slowest + exposed))


def buckets(gradient_bytes: int) -> list[int]:
    """The sizes of DDP's buckets in bytes, in the order in which the backward pass fills them; the rest comes last."""
    full, rest = divmod(gradient_bytes, BUCKET)
    return [BUCKET] * full + ([rest] if rest else [])


def ring_seconds(size: int, cluster: Cluster, gpus: int) -> float:
    """Seconds of a ring all-reduce of `size` bytes (Patarasuk and Yuan 2009). Its slowest link limits it.

    In each of 2 (n - 1) rounds, every GPU sends a part of size / n. In a round, the link between two nodes carries one
    part, for any number of GPUs per node.
    """
    if gpus == 1:
        return 0.0
    link = cluster.within if gpus <= cluster.gpus_per_node else cluster.between
    return 2 * (gpus - 1) * (size / gpus / link.bytes_per_second + link.latency)


def _exposed(backward: float, sums: Sequence[float]) -> float:
    """Seconds from the end of the backward pass to the end of the last all-reduce; buckets fill at equal intervals."""
    free = 0.0
    for number, seconds in enumerate(sums, 1):
        free = max(free, backward * number / len(sums)) + seconds
    return max(0.0, free - backward)


def _largest_of(count: int) -> float:
    """The expected maximum of `count` standard normal values (Blom 1958)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
