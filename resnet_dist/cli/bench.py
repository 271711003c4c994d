"""`resnet-dist bench`: where training spends its time on this machine, and what to change."""

from resnet_dist.bench.options import BenchConfig

Config = BenchConfig


def main(cfg: BenchConfig) -> int:
    """Measure, print and write the JSON file. Returns the exit code."""
    from resnet_dist.bench.run import run_bench

    run_bench(cfg)
    return 0
