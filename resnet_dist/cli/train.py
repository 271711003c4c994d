"""`resnet-dist train`: fine-tune a ResNet on a folder of images."""

from resnet_dist.config.schema import TrainConfig
from resnet_dist.training.run import run_training

Config = TrainConfig


def main(cfg: TrainConfig) -> int:
    """Train, evaluate the best checkpoint, and write the run folder. Returns the exit code."""
    run_training(cfg)
    return 0
