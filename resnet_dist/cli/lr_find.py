"""`resnet-dist lr-find`: the learning-rate range test of a recipe on the user's data."""

from resnet_dist.training.lr_find import LrFindConfig, run_lr_find

Config = LrFindConfig


def main(cfg: LrFindConfig) -> int:
    """Run the test, write its picture and table, and print the rates that it suggests. Returns the exit code."""
    run_lr_find(cfg)
    return 0
