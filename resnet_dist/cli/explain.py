"""`resnet-dist explain`: saliency maps of image files, or of a run's worst mistakes."""

from resnet_dist.evaluation.explain import ExplainConfig, run_explain
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.wording import counted

Config = ExplainConfig


def main(cfg: ExplainConfig) -> int:
    """Explain, write the maps, and print where they are. Returns the exit code."""
    explained = run_explain(cfg)
    if launcher.rank() == 0:
        print(f"{counted(explained.images, 'image')} explained by {cfg.method}: {explained.sheet} shows them")
    return 0
