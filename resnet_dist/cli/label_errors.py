"""`resnet-dist label-errors`: the training images of a run whose labels are probably wrong."""

from resnet_dist.evaluation.label_errors import LabelErrorsConfig, run_label_errors
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.wording import printable, shortened

SHOWN = 10
Config = LabelErrorsConfig


def main(cfg: LabelErrorsConfig) -> int:
    """Rank the labels, write the table, and print its first rows. Returns the exit code."""
    ranking = run_label_errors(cfg)
    if launcher.rank() == 0:
        print(printable(ranking.sentence))
        for path, label, likely in ranking.suspects[:SHOWN]:
            print(printable(f"  {shortened(path, 60)}: labelled {label}, likely {likely}"))
        print(
            printable(
                f"{ranking.file} lists all, the most doubtful first; `resnet-dist report {cfg.run}` shows the images"
            )
        )
    return 0
