"""`resnet-dist bench ladder`: what each optimisation gains on this machine, one after the other."""

from resnet_dist.bench.options import LadderConfig

Config = LadderConfig


def main(cfg: LadderConfig) -> int:
    """Measure, print and write the JSON file. Returns the exit code."""
    from resnet_dist.bench.ladder import run_ladder

    run_ladder(cfg)
    return 0
