"""The simulated scaling against published runs, and against sums that can be done by hand."""

import pytest

from resnet_dist.bench.scaling_estimate import BUCKET, Cluster, Link, Step, buckets, estimate, ring_seconds

RESNET50 = 4 * 25_557_032  # bytes of its gradient
ETHERNET_50 = Link(0.86 * 50e9 / 8, 10e-6)
INFINIBAND_100 = Link(0.86 * 100e9 / 8, 5e-6)  # 0.86: protocols take the rest
V100 = Cluster(INFINIBAND_100, within=Link(60e9, 5e-6))
P100 = Cluster(ETHERNET_50, within=Link(20e9, 5e-6))

# ResNet-50: (what, seconds of a step of one GPU, cluster, from how many GPUs, to how many, published efficiency).
# DDP: pytorch/benchmarks/distributed/ddp, 32 images, float32. DLPerf: Oneflow-Inc, NVIDIA's PyTorch script; a batch of
# 128 and the speeds of one V100 in NVIDIA's DeepLearningExamples (367 and 1,200 images/s) are assumed. Goyal: arXiv
# 1706.02677, 32 images; 175 images/s of a P100 are assumed.
PUBLISHED = [
    ("DDP", 32 / 319, V100, 1, 8, 307 / 319),
    ("DDP", 32 / 319, V100, 1, 16, 306 / 319),
    ("DLPerf float32", 128 / 367, V100, 1, 8, 7.86 / 8),
    ("DLPerf float32", 128 / 367, V100, 1, 16, 15.56 / 16),
    ("DLPerf float32", 128 / 367, V100, 1, 32, 29.72 / 32),
    ("DLPerf AMP", 128 / 1200, V100, 1, 8, 7.67 / 8),
    ("DLPerf AMP", 128 / 1200, V100, 1, 16, 14.94 / 16),
    ("DLPerf AMP", 128 / 1200, V100, 1, 32, 28.09 / 32),
    ("Goyal", 32 / 175, P100, 8, 256, 0.90),
]


def efficiency(seconds: float, cluster: Cluster, start: int, gpus: int) -> float:
    step = Step(seconds, RESNET50)
    return estimate(step, cluster, gpus).efficiency / estimate(step, cluster, start).efficiency


@pytest.mark.parametrize(("what", "seconds", "cluster", "start", "gpus", "published"), PUBLISHED)
def test_published_efficiency_is_met_within_five_points(
    what: str, seconds: float, cluster: Cluster, start: int, gpus: int, published: float
) -> None:
    assert efficiency(seconds, cluster, start, gpus) == pytest.approx(published, abs=0.05), what


def test_published_efficiencies_are_met_within_two_and_a_half_points_on_average() -> None:
    off = [abs(efficiency(*case[1:5]) - case[5]) for case in PUBLISHED]
    assert sum(off) / len(off) < 0.025


@pytest.mark.parametrize(("gbits", "milliseconds"), [(100, 19), (25, 73), (10, 186)])
def test_ring_takes_what_is_known_for_resnet50_between_machines(gbits: float, milliseconds: float) -> None:
    link = Link(0.88 * gbits * 1e9 / 8, 0.0)
    assert 1000 * ring_seconds(RESNET50, Cluster(link), 512) == pytest.approx(milliseconds, rel=0.03)


def test_one_gpu_takes_its_own_time() -> None:
    one = estimate(Step(0.1, RESNET50), V100, 1)
    assert (one.seconds, one.all_reduce, one.exposed, one.efficiency) == (0.1, 0.0, 0.0, 1.0)


def test_sums_hide_behind_the_backward_pass() -> None:
    """Two buckets of 26 ms in a backward pass of 60 ms: the first is hidden, the second comes after it."""
    cluster = Cluster(Link(1e9, 0.0), gpus_per_node=1)
    step = Step(0.09, 2 * BUCKET, jitter=0.0)
    seconds = ring_seconds(BUCKET, cluster, 2)
    assert seconds == pytest.approx(BUCKET / 1e9)
    found = estimate(step, cluster, 2)
    assert found.exposed == pytest.approx(seconds) and found.all_reduce == pytest.approx(2 * seconds)
    assert found.efficiency == pytest.approx(0.09 / (0.09 + seconds))


def test_sums_that_are_slower_than_the_backward_pass_queue() -> None:
    cluster = Cluster(Link(1e6, 0.0), gpus_per_node=1)
    found = estimate(Step(0.09, 3 * BUCKET, jitter=0.0), cluster, 2)
    assert found.exposed == pytest.approx(3 * ring_seconds(BUCKET, cluster, 2) - 0.04)


def test_half_the_bytes_help_most_on_slow_networks() -> None:
    slow, fast = (Cluster(Link(gbits * 1e9 / 8, 1e-5)) for gbits in (25, 400))
    whole, half = Step(0.05, RESNET50), Step(0.05, RESNET50 // 2)
    assert estimate(half, slow, 64).efficiency > 1.3 * estimate(whole, slow, 64).efficiency
    assert estimate(half, fast, 64).efficiency == pytest.approx(estimate(whole, fast, 64).efficiency, abs=0.01)


def test_buckets_hold_all_bytes() -> None:
    assert buckets(2 * BUCKET) == [BUCKET, BUCKET] and buckets(5) == [5] and sum(buckets(RESNET50)) == RESNET50


def test_no_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 GPU, not 0"):
        estimate(Step(0.1, 1), V100, 0)
