"""`resnet-dist check`: check every image before training."""

from resnet_dist.data.check_report import CheckConfig, run_check
from resnet_dist.runtime.wording import printable

Config = CheckConfig


def main(cfg: CheckConfig) -> int:
    """Check and print. Returns the exit code: 3 if a file cannot be used."""
    report = run_check(cfg)
    for line in report.lines():
        print(printable(line))
    return 0 if report.ok else 3
