"""`resnet-dist export`: export the best checkpoint to ONNX and verify it against PyTorch."""

from export.run import ExportConfig, run_export

Config = ExportConfig


def main(cfg: ExportConfig) -> int:
    """Export, verify and print the results. Returns the exit code."""
    from resnet_dist.runtime.display import Display

    with Display(enabled=True).busy("exporting and verifying", prints=True):
        run_export(cfg)
    return 0
