"""`resnet-dist bench scaling`: how training scales with the number of processes on this machine."""

from resnet_dist.bench.options import ScalingConfig

Config = ScalingConfig


def main(cfg: ScalingConfig) -> int:
    """Measure, print and write the JSON file. Returns the exit code."""
    from resnet_dist.bench.scaling import run_scaling

    run_scaling(cfg)
    return 0
