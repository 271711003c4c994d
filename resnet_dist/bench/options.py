"""The options of the three measurements, and what they share: a training to measure, for how long, and a JSON file."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from resnet_dist.config.fields import out_of_range
from resnet_dist.config.schema import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PreprocessConfig,
    RunConfig,
    SystemConfig,
    TrainConfig,
)
from resnet_dist.errors import UsageError
from resnet_dist.files.outputs import json_problems

NOT_AUTO = "--batch-size auto: give the number of images to measure"


@dataclass(frozen=True, kw_only=True)
class MeasuredTraining:
    """A training to measure."""

    JSON_KEYS: ClassVar[tuple[str, ...]] = ()  # a file with these keys is an older output, which may be replaced
    LEAST_EPOCHS: ClassVar = 1

    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig(model="resnet18", weights="none")
    optim: OptimConfig = OptimConfig()
    system: SystemConfig = SystemConfig()
    epochs: int = 3
    """Epochs of training to time; the first is reported separately."""
    epoch_steps: int | None = None
    """Steps per epoch, on images spread evenly over DATA (default: 4 per loader process, at least 6)."""
    json: str | None = None
    """JSON file to which all measurements are written."""

    @property
    def batch_size(self) -> int:
        """Images per batch and process. Raises UsageError for `auto`: what is measured must be stated."""
        if self.data.batch_size == "auto":
            raise UsageError(NOT_AUTO)
        return self.data.batch_size

    def images_per_step(self, processes: int) -> int:
        """Images per optimizer step of all processes together."""
        return self.data.global_batch_size or processes * self.batch_size * self.optim.grad_accum

    def train_config(self, data: str) -> TrainConfig:
        """The training that is measured, on the images in `data` if the options name none.

        It is compiled from the first step or not at all: `--compile auto` would mix both in one table.
        """
        compile_ = "off" if self.system.compile == "auto" else self.system.compile
        return TrainConfig(
            data=replace(self.data, data=self.data.data or data),
            preprocess=self.preprocess,
            augment=self.augment,
            model=self.model,
            optim=self.optim,
            run=RunConfig(epochs=2),
            system=replace(self.system, compile=compile_),
        )

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from self.train_config("DATA").problems()
        if self.data.batch_size == "auto":
            yield NOT_AUTO
        yield from json_problems("--json", self.json, *self.JSON_KEYS)
        yield from out_of_range(self, self.LEAST_EPOCHS, math.inf, "epochs")
        yield from out_of_range(self, 1, math.inf, "epoch_steps")


@dataclass(frozen=True, kw_only=True)
class TimedInWindows(MeasuredTraining):
    """A training whose single steps are timed too, in windows of several steps."""

    windows: int = 5
    """Timings of several steps each (windows), of which the median is reported."""
    window_steps: int | None = None
    """Steps in one window (default: as many as fit into half a second)."""
    warmup_steps: int | None = None
    """Steps before the first window (default: 2 on a CPU, 20 on a GPU)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from super().problems()
        yield from out_of_range(self, 1, math.inf, "windows", "window_steps")
        yield from out_of_range(self, 0, math.inf, "warmup_steps")
        changes = self.augment.aug != "none" or self.augment.mixup or self.augment.cutmix
        if self.data.cache == "device" and self.augment.augment_on == "host" and changes:
            yield (
                "--cache device needs images without random changes on the CPU: add --augment-on device, or use "
                "--aug none without --mixup and --cutmix, or --cache ram"
            )


@dataclass(frozen=True, kw_only=True)
class BenchConfig(TimedInWindows):
    """Measure this machine, data loading, computing and whole training, and say in one line what to change."""

    JSON_KEYS: ClassVar = ("machine", "regimes")

    regimes: tuple[Literal["full", "layer4+head", "head"], ...] = ("full", "layer4+head", "head")
    """What is trained: all stages, the last stage and the head, or the head alone."""
    predict: bool = True
    """Also export the model to ONNX and time its predictions, from image files to labels."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from super().problems()
        if not self.regimes:
            yield "--regimes is empty: name at least one of full, layer4+head, head"


@dataclass(frozen=True, kw_only=True)
class LadderConfig(MeasuredTraining):
    """Measure training with all optimisations off, then with one more each time, and print what each one gains."""

    JSON_KEYS: ClassVar = ("machine", "rungs")
    LEAST_EPOCHS: ClassVar = 2

    epochs: int = 2
    """Epochs of training to time for each optimisation and round; the first does not count."""
    rounds: int = 3
    """Rounds; each measures all optimisations once, and the median round is reported."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(TimedInWindows):
    """Measure training with several numbers of processes on this machine, each with the same batch size per process."""

    JSON_KEYS: ClassVar = ("worlds", "reports")

    world_sizes: tuple[int, ...] = (1, 2)
    """Numbers of processes; one process without a launcher is always measured first."""
    estimate: bool = False
    """Also estimate the speed on 8, 64 and 512 such GPUs in nodes of 8, from the measured step of one process."""
    link_gbits: float = 100.0
    """For --estimate: Gbit/s that a node's connection to the other nodes really transfers."""
    link_latency: float = 5.0
    """For --estimate: microseconds until a message between two nodes arrives."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from super().problems()
        yield from out_of_range(self, 1, math.inf, "world_sizes")
        yield from out_of_range(self, 0, 1e6, "link_gbits", open_low=True)
        yield from out_of_range(self, 0, 1e6, "link_latency")
        if not self.world_sizes:
            yield "--world-sizes is empty: name at least one number of processes, such as 2"
