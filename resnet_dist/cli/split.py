"""`resnet-dist split`: split a folder into train, val and test, as a manifest, links or copies."""

from resnet_dist.data.split_files import SplitConfig, run_split
from resnet_dist.runtime.wording import printable

Config = SplitConfig


def main(cfg: SplitConfig) -> int:
    """Split and print. Returns the exit code."""
    done = run_split(cfg)
    for line in (*done.notes, done.line()):
        print(printable(line))
    return 0
