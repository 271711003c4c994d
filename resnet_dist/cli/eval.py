"""`resnet-dist eval`: metrics of a run, a checkpoint or an exported model, and a prediction for every image."""

from resnet_dist.evaluation.run import EvalConfig, run_evaluation

Config = EvalConfig


def main(cfg: EvalConfig) -> int:
    """Evaluate, write and print. Returns the exit code."""
    evaluation = run_evaluation(cfg)

    from resnet_dist.evaluation.summary import summary_rows, title_of
    from resnet_dist.runtime import environment as launcher
    from resnet_dist.runtime.display import Display

    Display(launcher.rank() == 0).table(title_of(evaluation), summary_rows(evaluation))
    return 0
