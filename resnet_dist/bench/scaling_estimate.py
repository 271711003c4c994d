"""How a measured training step would scale to clusters that are not at hand: a simulation, not a measurement.

Every GPU computes its step; DDP sums the gradients in buckets while the backward pass still runs. What costs time is
the rest of the sums after the backward pass, and the slowest GPU of each step. Loading images and evaluation are left
out, and so are trees, which NCCL may use instead of rings among many nodes. Published efficiencies of ResNet-50 on 8 to
256 GPUs are met within five points (tests/bench/test_scaling_estimate.py).
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
        seconds: of the whole step.
        backward: the share of them in the backward pass, 0..1.
        gradient_bytes: what all GPUs sum.
        jitter: the standard deviation of the seconds from GPU to GPU and step to step, as a share of them. 2 % makes
            the estimate that of the eight V100s in PyTorch's own DDP benchmark (96 %).
    """

    seconds: float
    gradient_bytes: int
    backward: float = 2 / 3
    jitter: float = 0.02


@dataclass(frozen=True)
class Link:
    """A connection: bytes per second that it really moves, and seconds for one message to arrive."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs: the link of a node to the others, and those between the GPUs of a node."""

    between: Link
    within: Link = Link(130e9, 5e-6)  # about half of what NVLink of an A100 can do
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Estimate:
    """A step on many GPUs.

    Attributes:
        gpus: how many.
        seconds: of the step.
        all_reduce: seconds that summing the gradients takes, hidden or not.
        exposed: seconds of it that the GPUs wait.
        efficiency: speed per GPU relative to one GPU, 0..1.
    """

    gpus: int
    seconds: float
    all_reduce: float
    exposed: float
    efficiency: float


def estimate(step: Step, cluster: Cluster, gpus: int) -> Estimate:
    """What a step takes on so many GPUs. Raises ValueError for fewer than one."""
    if gpus < 1:
        raise ValueError(f"a cluster has at least 1 GPU, not {gpus}")
    slowest = step.seconds * (1 + step.jitter * _largest_of(gpus))
    sums = [ring_seconds(size, cluster, gpus) for size in buckets(step.gradient_bytes)]
    exposed = _exposed(slowest * step.backward, sums)
    return Estimate(gpus, slowest + exposed, sum(sums), exposed, step.seconds / (slowest + exposed))


def buckets(gradient_bytes: int) -> list[int]:
    """The sizes of DDP's buckets, in the order in which the backward pass fills them; the rest comes last."""
    full, rest = divmod(gradient_bytes, BUCKET)
    return [BUCKET] * full + ([rest] if rest else [])


def ring_seconds(size: int, cluster: Cluster, gpus: int) -> float:
    """Seconds of a ring all-reduce of `size` bytes (Patarasuk and Yuan 2009), which is as fast as its slowest link.

    In each of 2 (n - 1) rounds, every GPU sends a part of size / n. A ring passes the link of a node to the others once
    in a round, however many GPUs the node has.
    """
    if gpus == 1:
        return 0.0
    link = cluster.within if gpus <= cluster.gpus_per_node else cluster.between
    return 2 * (gpus - 1) * (size / gpus / link.bytes_per_second + link.latency)


def _exposed(backward: float, sums: Sequence[float]) -> float:
    """Seconds from the end of the backward pass to the end of the last sum; buckets get full at equal intervals."""
    free = 0.0
    for number, seconds in enumerate(sums, 1):
        free = max(free, backward * number / len(sums)) + seconds
    return max(0.0, free - backward)


def _largest_of(count: int) -> float:
    """The expected largest of so many standard normal values (Blom 1958)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
