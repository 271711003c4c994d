"""`resnet-dist report`: draw the plots of a run and write its report.html again."""

from resnet_dist.report.run import ReportConfig, run_report

Config = ReportConfig


def main(cfg: ReportConfig) -> int:
    """Write the plots and the page. Returns the exit code."""
    file = run_report(cfg)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return 0
