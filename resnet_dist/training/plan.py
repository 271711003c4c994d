"""The plan of a training: what was decided and why, before memory is allocated; and the plan as text."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from export.predict import Preprocessing
from resnet_dist.config.schema import OptimConfig, Phase, TrainConfig
from resnet_dist.config.stored import portable
from resnet_dist.data.check import Finding, usable
from resnet_dist.data.index import ImageIndex, read_index
from resnet_dist.data.loader import Share, TrainBatches, default_workers
from resnet_dist.data.preprocess import preprocessing, settings_of
from resnet_dist.data.transforms import Transform, stream_seed
from resnet_dist.errors import UsageError
from resnet_dist.files.header import random_stream_of
from resnet_dist.model import weights
from resnet_dist.model.batch_norm import FEW_IMAGES, Sync, backbone_batch_norms, choose_sync_bn
from resnet_dist.model.checkpoint import Description
from resnet_dist.model.published import of_settings
from resnet_dist.model.resnet import Architecture, empty, stage_of
from resnet_dist.model.start import StartingPoint
from resnet_dist.model.trainable import batch_norm_of_one_value, select, updating_batch_norms
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import on_main
from resnet_dist.runtime.wording import counted
from resnet_dist.training.batch_size import find_batch_size
from resnet_dist.training.compile import check_graphs
from resnet_dist.training.optim import (
    DEFAULT_MOMENTUM,
    DEFAULT_WEIGHT_DECAY,
    PlannedOptimizer,
    default_lr,
    scaled,
    stage_rates,
)
from resnet_dist.training.state import Best

FEW_STEPS = 20  # a training with fewer optimizer steps warns


@dataclass(frozen=True)
class PlannedPhase:
    """What one phase trains, and for how long.

    Attributes:
        epochs: the number of its epochs, at least 1.
        selection: what learns, in the words of the settings.
        trainable: the names of the parameters that learn, in the model's order.
        updating: the BatchNorm layers of the backbone whose statistics update; the others are in evaluation mode.
        rates: the base learning rate of each stage that learns, from the stem to the head.
    """

    epochs: int
    selection: str
    trainable: tuple[str, ...]
    updating: tuple[str, ...]
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before memory is taken: `--dry-run` prints it, and the training follows it.

    Attributes:
        cfg: the settings as they are stored with the run: those that were asked for, with what was decided in place of
            what was left open, so that the run can be resumed as it is. The numbers below are read from the plan.
        batches: which samples the steps take. Its `share` has the batch size per process, the accumulated batches and
            the global batch size; its seed comes from the seed and the random stream.
        eval_batch_size: images per evaluation batch and process.
        workers: loader processes of this process; 0 loads in the process itself.
        sync_bn: whether BatchNorm statistics are computed over all processes.
        reasons: a line for each automatic value.
        train_transform: the user's, for `--aug custom`.
    """

    cfg: TrainConfig
    index: ImageIndex
    architecture: Architecture
    spec: Preprocessing
    batches: TrainBatches
    eval_batch_size: int
    workers: int
    optimizer: PlannedOptimizer
    phases: tuple[PlannedPhase, ...]
    sync_bn: Sync
    reasons: tuple[str, ...]
    bad_images: tuple[Finding, ...] = ()
    train_transform: Transform | None = None

    @property
    def share(self) -> Share:
        """The part of every global batch that this process takes."""
        return self.batches.share

    def steps(self, phase: PlannedPhase) -> int:
        """Optimizer steps of a phase."""
        return phase.epochs * self.batches.steps_per_epoch

    def description(self, best: Best) -> Description:
        """The description that is stored in the best checkpoint."""
        return Description(
            architecture=self.architecture,
            classes=self.index.classes,
            preprocessing=self.spec,
            config=portable(self.cfg),
            epoch=best.epoch,
            score=best.score,
            weights_kind=best.weights_kind,
        )

    def lines(self) -> list[str]:
        """The plan as text: data, phases, learning rates."""
        index, share = self.index, self.share
        images = f"{len(index.train)} training and {counted(len(index.val), 'validation image')}"
        data = f"{counted(len(index.classes), 'class')}, {images}"
        parts = f"{share.batch_size} per process x {counted(share.world, 'process')} x {share.accumulate} accumulated"
        batch = f"global batch {share.global_batch} = {parts}"
        bad = [f"WARNING: {counted(len(self.bad_images), 'unusable image')} left out"] if self.bad_images else []
        return [
            data,
            *self._test_line(),
            *index.notes,
            *bad,
            batch,
            *self._batch_norm_per_process(),
            *self.reasons,
            *self._lines_of_phases(),
            *self._few(),
        ]

    def _test_line(self) -> Iterator[str]:
        """What happens to the test images, if there are any."""
        if len(self.index.test):
            images = counted(len(self.index.test), "test image")
            yield f"{images}: not used in training or to choose; `resnet-dist eval RUN --split test` evaluates them"

    def _batch_norm_per_process(self) -> Iterator[str]:
        """A note if BatchNorm makes the result depend on the number of processes; a warning if it has few images."""
        if self.share.world == 1 or self.sync_bn.on or not any(phase.updating for phase in self.phases):
            return
        size = self.share.batch_size
        yield (
            f"{'WARNING: ' if size < FEW_IMAGES else ''}BatchNorm takes its statistics from the "
            f"{counted(size, 'image')} of each process, so the result is not that of one process; --sync-bn on (GPUs "
            "only) or frozen statistics make it the same"
        )

    def _few(self) -> Iterator[str]:
        """A warning about a training that is too short to learn much."""
        steps = sum(map(self.steps, self.phases))
        if steps < FEW_STEPS:
            yield (
                f"WARNING: only {counted(steps, 'optimizer step')} in all, too few to learn much; give more --epochs "
                "or a smaller --batch-size"
            )

    def _lines_of_phases(self) -> list[str]:
        cfg, model = self.cfg, empty(self.architecture)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        norms, total = len(list(backbone_batch_norms(model))), sum(sizes.values())
        how = f"{self.optimizer.name}, {cfg.schedule.sched} schedule"
        lines = [f"{cfg.model.model}, {counted(len(self.phases), 'phase')}, {counted(cfg.run.epochs, 'epoch')}: {how}"]
        for number, phase in enumerate(self.phases, 1):
            learning = sum(sizes[name] for name in phase.trainable)
            rates = " ".join(f"{stage}={rate:g}" for stage, rate in phase.rates.items())
            lines.append(
                f"  phase {number}: {counted(phase.epochs, 'epoch')}, {counted(self.steps(phase), 'step')}; "
                f"learns '{phase.selection}', {learning:,} of {total:,} parameters ({100 * learning / total:.1f} %)"
            )
            lines.append(f"           BatchNorm {_batch_norm_text(len(phase.updating), norms)}; lr {rates}")
        return lines


def _batch_norm_text(updating: int, norms: int) -> str:
    if updating in (0, norms):
        return "statistics update" if updating else "statistics frozen"
    return f"statistics update in {updating} of {norms} layers"


def make_plan(accelerator: Accelerator, cfg: TrainConfig, train_transform: Transform | None = None) -> Plan:
    """Find the images, decide what is automatic, and check that it fits together. Raises UsageError, DataError."""
    if (cfg.augment.aug == "custom") != (train_transform is not None):
        raise UsageError(
            "--aug custom needs a transform that is given in Python: resnet_dist.train(..., train_transform=...)"
        )
    if cfg.system.compile == "graphs":
        check_graphs(accelerator)
    index, bad = on_main(accelerator, lambda: usable(read_index(cfg.data), cfg.data))
    architecture = Architecture.of(cfg.model, len(index.classes))
    spec, spec_reasons = on_main(accelerator, lambda: plan_preprocessing(cfg))
    model = empty(architecture)
    batch_size, batch_reasons = plan_batch_size(accelerator, cfg, architecture, spec.img_size, len(index.train))
    share = share_of(cfg, accelerator, batch_size)
    stream, stream_reasons = random_stream(accelerator, cfg)
    optimizer, reasons = plan_optimizer(cfg, model, share.global_batch)
    stored = with_decisions(cfg, share, stream, optimizer, spec)
    lengths = zip(cfg.phase, cfg.phase_epochs(), strict=True)
    phases = tuple(plan_phase(phase, epochs, model, stored.optim, optimizer) for phase, epochs in lengths)
    batch_norm_trains = any(phase.updating for phase in phases)
    workers, eval_batch_size = cfg.data.workers, cfg.data.eval_batch_size
    plan = Plan(
        cfg=stored,
        index=index,
        architecture=architecture,
        spec=spec,
        batches=TrainBatches(len(index.train), stream_seed(cfg.run.seed, stream), share, cfg.data.drop_last),
        eval_batch_size=share.batch_size if eval_batch_size is None else eval_batch_size,
        workers=default_workers(accelerator.device, launcher.local_world_size()) if workers is None else workers,
        optimizer=optimizer,
        phases=phases,
        sync_bn=choose_sync_bn(cfg.system.sync_bn, accelerator, batch_norm_trains, share.batch_size),
        reasons=(*spec_reasons, *batch_reasons, *reasons, *stream_reasons),
        bad_images=tuple(bad),
        train_transform=train_transform,
    )
    check_batch_norm(plan)
    return plan


def plan_batch_size(
    accelerator: Accelerator, cfg: TrainConfig, architecture: Architecture, img_size: int, images: int
) -> tuple[int, list[str]]:
    """The batch size per process: --batch-size, or for `auto` the size found by a trial, with the reason.

    Raises MachineError.
    """
    asked = cfg.data.batch_size
    if asked != "auto":
        return asked, []
    planned, _ = plan_optimizer(cfg, empty(architecture), 1)
    size, reason = find_batch_size(accelerator, cfg, architecture, img_size, planned, images)
    return size, [reason]


def share_of(cfg: TrainConfig, accelerator: Accelerator, batch_size: int) -> Share:
    """This process's part of the global batch: --global-batch-size divided, or `batch_size` as it is.

    A run stores the global batch size: resumed by another number of processes, it is divided among those. Raises
    UsageError if it is not a multiple.
    """
    accumulate, processes = cfg.optim.grad_accum, accelerator.num_processes
    parts, wanted = processes * accumulate, cfg.data.global_batch_size
    if wanted is not None and wanted % parts:
        how = f"{counted(processes, 'process')} x {counted(accumulate, 'accumulated batch')}"
        raise UsageError(f"--global-batch-size {wanted}: not a multiple of {parts} ({how})")
    batch_size = batch_size if wanted is None else wanted // parts
    problems = list(cfg.problems_of_batch(batch_size))
    if problems:
        raise UsageError(problems)
    return Share(batch_size, accumulate, processes, accelerator.process_index)


def random_stream(accelerator: Accelerator, cfg: TrainConfig) -> tuple[int, list[str]]:
    """The random stream, and the reason if it is automatic: a run with --init-from must not repeat the old run's
    samples.

    Raises ArtifactError if the old checkpoint cannot be read.
    """
    old = cfg.run.init_from
    if cfg.run.random_stream is not None:
        return cfg.run.random_stream, []
    if old is None:
        return 0, []
    before = on_main(accelerator, lambda: random_stream_of(old))
    return 1 + before, [f"random stream {1 + before} (automatic: the run that this one starts from had {before})"]


def plan_optimizer(cfg: TrainConfig, model: nn.Module, global_batch: int) -> tuple[PlannedOptimizer, list[str]]:
    """The optimizer with everything automatic decided, and a line with the reason for each value."""
    asked: OptimConfig = cfg.optim
    reasons = []
    lr, weight_decay, momentum, factor = asked.lr, asked.weight_decay, asked.momentum, 1.0
    if lr is None:
        lr, why = default_lr(asked.opt, _only_head(model, cfg.phase[0]), start_of(cfg).pretrained)
        reasons.append(f"lr {lr:g} (automatic: {why})")
    if weight_decay is None:
        weight_decay = DEFAULT_WEIGHT_DECAY.get(asked.opt, 0.0)
        reasons.append(f"weight decay {weight_decay:g} (automatic: usual for {asked.opt})")
    if momentum is None:
        momentum = DEFAULT_MOMENTUM.get(asked.opt, 0.0)
    if asked.lr_base_size is not None:
        factor = global_batch / asked.lr_base_size
        reasons.append(
            f"learning rates times {factor:g} (global batch {global_batch} / --lr-base-size): lr {lr * factor:g}"
        )
    planned = PlannedOptimizer(
        name=asked.opt,
        base_lr=lr,
        lr_factor=factor,
        momentum=momentum,
        nesterov=asked.nesterov,
        weight_decay=weight_decay,
        decay_norm_and_bias=asked.decay_norm_and_bias,
        clip_grad=math.inf if asked.clip_grad is None else asked.clip_grad,
    )
    return planned, reasons


def _only_head(model: nn.Module, phase: Phase) -> bool:
    norms = {name for name, _ in backbone_batch_norms(model)}
    return all(stage_of(name) == "head" or name.rpartition(".")[0] in norms for name in select(model, phase.trainable))


def plan_phase(
    phase: Phase, epochs: int, model: nn.Module, optim: OptimConfig, optimizer: PlannedOptimizer
) -> PlannedPhase:
    """A phase of `epochs` epochs, planned for `model`. The rates that `optim` sets include the factor already.

    Raises UsageError if it selects no parameters.
    """
    trainable = select(model, phase.trainable)
    learning = {stage_of(name) for name in trainable}
    return PlannedPhase(
        epochs=epochs,
        selection=phase.trainable,
        trainable=tuple(trainable),
        updating=tuple(updating_batch_norms(model, phase)),
        rates={stage: rate for stage, rate in stage_rates(optim, optimizer.lr, phase).items() if stage in learning},
    )


def with_decisions(
    cfg: TrainConfig, share: Share, stream: int, optimizer: PlannedOptimizer, spec: Preprocessing
) -> TrainConfig:
    """The settings with the decided values in them: the form in which they are stored with the run.

    The preprocessing of a weights file is stored too, as the file may be gone when the run is resumed.
    """
    if start_of(cfg).kind == "file":
        cfg = dataclasses.replace(cfg, preprocess=settings_of(spec))
    data = dataclasses.replace(cfg.data, batch_size=share.batch_size, global_batch_size=share.global_batch)
    optim = scaled(cfg.optim, optimizer.lr_factor)
    optim = dataclasses.replace(
        optim, lr=optimizer.lr, lr_base_size=None, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
    )
    stored_stream = cfg.run.random_stream if cfg.run.init_from is None else stream
    run = dataclasses.replace(cfg.run, random_stream=stored_stream)
    return dataclasses.replace(cfg, data=data, optim=optim, run=run)


def check_batch_norm(plan: Plan) -> None:
    """Raise UsageError if a BatchNorm would get one value per channel in training: torch cannot compute a variance."""
    batch, size = plan.share.batch_size, plan.spec.img_size
    if batch > 1 or (plan.sync_bn.on and plan.share.world > 1):
        return
    for number, phase in enumerate(plan.phases, 1):
        layer = batch_norm_of_one_value(empty(plan.architecture), phase.updating, (batch, 3, size, size))
        if layer is not None:
            raise UsageError(
                f"--batch-size {batch}: in phase {number} BatchNorm {layer} would see one value per channel and image "
                f"of {size} pixels, and cannot compute a variance; take at least 2 images per process"
            )


def start_of(cfg: TrainConfig) -> StartingPoint:
    """Where the weights of a new run come from."""
    return StartingPoint.of(cfg.model.weights, cfg.run.init_from)


def plan_preprocessing(cfg: TrainConfig) -> tuple[Preprocessing, list[str]]:
    """The preprocessing: that of the weights with the changes of the settings, and a line that says where it is from if
    the weights are a file. Raises UsageError, ArtifactError, MachineError.
    """
    start = start_of(cfg)
    if cfg.preprocess.is_complete:
        return preprocessing(cfg.preprocess), []
    if start.kind == "run" and start.file is not None:
        return preprocessing(cfg.preprocess, weights.preprocessing_in(start.file)), []
    said = of_settings(cfg.model)
    spec = preprocessing(cfg.preprocess, said.preprocessing)
    return spec, [said.line(start.source, spec)] if start.kind == "file" else []
