"""`resnet-dist compare`: train several techniques on the same data, and test which differences are real."""

from collections.abc import Sequence

from resnet_dist.cli.parser import typed
from resnet_dist.config.layers import resolve
from resnet_dist.training.comparison import CompareConfig, configs_of, run_comparison

Config = CompareConfig


def read(arguments: Sequence[str]) -> list[CompareConfig]:
    """A config for each recipe (see `configs_of`). Raises UsageError."""
    words = typed(CompareConfig, arguments, "resnet-dist compare")
    return configs_of(words.given, lambda given: resolve(CompareConfig, given, words.problems))


def main(configs: Sequence[CompareConfig]) -> int:
    """Train what is not trained yet, compare, print and write. Returns the exit code."""
    run_comparison(configs)
    return 0
