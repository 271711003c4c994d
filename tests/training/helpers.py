"""Jobs for tests of the loop: built as `resnet-dist train` builds them, without a run folder on disk."""

from pathlib import Path

from resnet_dist.cli.parser import parse
from resnet_dist.config.schema import TrainConfig
from resnet_dist.files.run import RunFolder
from resnet_dist.runtime.accelerate import start
from resnet_dist.runtime.display import Display
from resnet_dist.runtime.signals import StopRequests
from resnet_dist.training.job import Job, build_job
from resnet_dist.training.plan import make_plan


def config_of(*arguments: str | Path) -> TrainConfig:
    """The config of a `train` command line."""
    config: TrainConfig = parse(TrainConfig, [str(a) for a in arguments], "train")
    return config


def job_of(run: Path, *arguments: str | Path) -> Job:
    """A job in `run`, a folder with room for checkpoints and metrics."""
    cfg = config_of(*arguments)
    accelerator, _ = start(cfg.system, cfg.run.seed)
    (run / "checkpoints").mkdir(parents=True)
    return build_job(accelerator, make_plan(accelerator, cfg), RunFolder(run), Display(enabled=False), StopRequests())
