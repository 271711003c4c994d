"""The only training loop. Every technique is a value of its phases."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from resnet_dist.config.schema import BEST_METRICS
from resnet_dist.data.loader import EvalLoader
from resnet_dist.data.prefetch import copied_ahead
from resnet_dist.data.transforms import Batch
from resnet_dist.errors import NonFiniteError, Preempted
from resnet_dist.evaluation.collect import collect_records
from resnet_dist.evaluation.metrics import headline
from resnet_dist.evaluation.records import Records
from resnet_dist.model.batch_norm import (
    BatchNorm,
    averaged_statistics,
    counted_together,
    counting_batch_norms,
    share_statistics,
)
from resnet_dist.model.checkpoint import save_best
from resnet_dist.model.head import set_sample_keys
from resnet_dist.model.trainable import set_trainable, train_mode
from resnet_dist.runtime.accelerate import check_in_step, on_main, read_values, wrap
from resnet_dist.runtime.signals import StopRequested
from resnet_dist.runtime.wording import counted
from resnet_dist.training.compile import compiled, pays
from resnet_dist.training.features import Features, Input, Source, source
from resnet_dist.training.job import Job
from resnet_dist.training.losses import Loss
from resnet_dist.training.optim import build_optimizer, param_groups, rates_now, scaled_step, step_if_finite
from resnet_dist.training.plan import PlannedPhase
from resnet_dist.training.resume import Resumed, restore_learner, save_state
from resnet_dist.training.schedule import Schedule
from resnet_dist.training.state import Best, State, newest_state
from resnet_dist.training.tally import Sums, Tally


@dataclass
class Learner:
    """What belongs to one phase: the source of samples, the wrapped network, the optimizer and the schedule.

    `net` is the wrapped network: no_sync, clipping and unwrapping need it. `forward` is the same or its compiled form,
    for the forward pass of training only. `tally` has the sums of this process since the last poll. `skipped`, float32
    () on the device, counts the steps of the phase that fp16 skipped because a gradient overflowed; it is equal on all
    processes. `batch_norms` are the layers whose counters are raised together.
    """

    phase: PlannedPhase
    source: Source
    net: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    tally: Tally
    skipped: torch.Tensor
    batch_norms: Sequence[BatchNorm]

    def logits(self, batch: Batch) -> torch.Tensor:
        """The logits of a batch in training, (B, num_classes)."""
        values = self.source.train_input(batch)
        with counted_together(self.batch_norms):
            return self.forward(values)


def train(job: Job, resumed: Resumed | None = None) -> State:
    """Run every phase in order, from the start or from the resumed state, and keep the best checkpoint.

    Raises Preempted if a signal asked to stop. The state is then saved, and a resumed run continues from it.
    """
    state = resumed.state if resumed else State()
    while True:
        learner = begin_phase(job, job.plan.phases[state.phase])
        if resumed:
            restore_learner(resumed, job, learner.optimizer, learner.schedule, learner.tally)
            learner.skipped.fill_(state.skipped)
            resumed = None
        try:
            learner.source.fill(job)
            while state.epoch_in_phase < learner.phase.epochs and state.stopped_by is None:
                train_one_epoch(job, learner, state)
                finish_epoch(job, learner, state)
        except StopRequested:
            save(job, learner, state)
            raise Preempted(
                f"stopped by a signal after {counted(state.steps_done, 'optimizer step')}; a checkpoint is written"
            ) from None
        check_that_a_step_was_taken(job, state)
        end_phase(job, learner)
        is_last = state.phase + 1 == len(job.plan.phases)
        if is_last or state.stopped_by == "time limit":
            break
        state.begin_phase(state.phase + 1)
    return state


def begin_phase(job: Job, phase: PlannedPhase) -> Learner:
    """Select the parameters that learn, and create optimizer, schedule and DDP wrapper for the phase."""
    plan = job.plan
    set_trainable(job.model, phase.trainable)
    schedule = Schedule(plan.cfg.schedule, job.train_loader.steps_per_epoch, phase.epochs)
    # The schedule is not prepared: Accelerate would step it once per process.
    built = build_optimizer(param_groups(job.model, plan.optimizer, phase.rates), plan.optimizer)
    share_statistics(job.accelerator, job.model)
    chosen = source(job, phase)
    net, optimizer = wrap(job.accelerator, chosen.train_module, built, plan.share.accumulate)
    if job.ema is not None:
        job.ema.follow(job.model)
    compile_ = plan.cfg.system.compile
    forward = compiled(net, compile_ == "graphs") if compile_ in ("on", "graphs") else net
    device = job.accelerator.device
    tally, skipped = Tally(device), torch.zeros((), device=device)
    layers = counting_batch_norms(chosen.train_module)
    return Learner(phase, chosen, net, forward, optimizer, schedule, tally, skipped, layers)


def end_phase(job: Job, learner: Learner) -> None:
    """Unwrap the network: otherwise the next phase would wrap the wrapper."""
    check_in_step(job.accelerator, job.model)
    job.accelerator.unwrap_model(learner.net, keep_fp32_wrapper=False)
    job.accelerator.free_memory(learner.net, learner.optimizer)


def train_one_epoch(job: Job, learner: Learner, state: State) -> None:
    """The optimizer steps of one epoch, from the step that the state has reached."""
    cfg, steps = job.plan.cfg, job.train_loader.steps_per_epoch
    started = time.monotonic() - state.epoch_seconds
    train_mode(job.model, learner.phase.updating)
    with job.display.epoch(f"epoch {state.epochs_done + 1}/{cfg.run.epochs}", steps, state.step_in_epoch):
        phase_end = state.epochs_done - state.epoch_in_phase + learner.phase.epochs
        loaded = learner.source.train_loader.epoch(state.epochs_done, state.step_in_epoch, phase_end)
        for batches in copied_ahead(loaded, job.accelerator.device):
            factor = learner.schedule.factor(state.epoch_in_phase * steps + state.step_in_epoch)
            set_rates(learner.optimizer, factor)
            train_step(job, learner, batches)
            state.step_in_epoch += 1
            state.steps_done += 1
            state.epoch_seconds = time.monotonic() - started
            job.display.step(state.step_in_epoch)
            if state.step_in_epoch % cfg.run.log_every == 0 or state.step_in_epoch == steps:
                poll(job, learner, state)
                compile_if_it_pays(job, learner, state, started)
            if cfg.run.save_every.unit == "steps" and state.steps_done % cfg.run.save_every.value == 0:
                save(job, learner, state)
            job.stop.check()
            if state.stopped_by is not None:
                break


def save(job: Job, learner: Learner, state: State) -> None:
    """Write a checkpoint to resume from. Every process must call this. Raises NonFiniteError instead of saving such
    values.
    """
    check_finite(job, learner, state)
    save_state(job, learner.optimizer, learner.schedule, learner.tally, state)


def train_step(job: Job, learner: Learner, batches: Sequence[Batch]) -> None:
    """One optimizer step over the micro-batches of this process.

    The loss is the weighted mean over the global batch: all micro-batches of all processes. The sums of the step are
    added to the learner's tally.
    """
    accelerator = job.accelerator
    batches = [batch.to(accelerator.device) for batch in batches]
    mine, total = denominator(accelerator, job.loss, batches)
    tally = learner.tally
    for number, batch in enumerate(batches):
        set_sample_keys(learner.source.train_module, batch.keys)
        is_last = number == len(batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(learner.net):
            logits = learner.logits(batch)
            numerator = job.loss.numerators(logits, batch).sum()
            # DDP averages gradients over the processes, so each process multiplies its part by their number.
            accelerator.backward(numerator * (accelerator.num_processes / total))
        tally.loss += numerator.detach()
        tally.correct += (logits.detach().argmax(1) == batch.targets).sum()
        tally.images += len(batch.targets)
    tally.weight += mine
    update(job, learner)


def update(job: Job, learner: Learner) -> None:
    """Take the step if the gradient is finite. Otherwise the parameters stay as they are until the next poll.

    DDP has averaged the gradients, so all processes decide alike and no process waits for the device. Under fp16, where
    overflows are expected, GradScaler decides; the gradient counts as not finite only if no scale helps.
    """
    accelerator, optimizer, clip = job.accelerator, learner.optimizer, job.plan.optimizer.clip_grad
    if accelerator.scaler is not None:
        if clip < math.inf:
            accelerator.clip_grad_norm_(learner.net.parameters(), clip)
        scaled_step(optimizer, accelerator.scaler, learner.skipped, learner.tally.nonfinite)
    else:
        gradients = [p.grad for p in learner.net.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip < math.inf:
            nn.utils.clip_grads_with_norm_(learner.net.parameters(), clip, norm)
        learner.tally.nonfinite.logical_or_(norm - norm)  # 0 where it is finite, otherwise NaN, which counts as true
        step_if_finite(optimizer, learner.tally.nonfinite)
    optimizer.zero_grad()
    if job.ema is not None:
        job.ema.update()


def denominator(
    accelerator: Accelerator, loss: Loss, batches: Sequence[Batch]
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """The summed weights of the samples of a step: of this process, and of all of them."""
    weights = [loss.denominators(batch) for batch in batches]
    sums = [weight.sum() for weight in weights if weight is not None]
    if not sums:
        count = float(sum(len(batch.targets) for batch in batches))
        return count, count * accelerator.num_processes
    mine = torch.stack(sums).sum()
    return mine, accelerator.reduce(mine, "sum")


def compile_if_it_pays(job: Job, learner: Learner, state: State, started: float) -> None:
    """With --compile auto, compile the network once the rest of the phase is long enough to gain from it."""
    if job.plan.cfg.system.compile != "auto" or learner.forward is not learner.net:
        return
    steps_per_epoch = job.train_loader.steps_per_epoch
    left = (learner.phase.epochs - state.epoch_in_phase) * steps_per_epoch - state.step_in_epoch
    seconds = (time.monotonic() - started) / state.step_in_epoch
    if on_main(job.accelerator, lambda: pays(job.accelerator.device, left, seconds)):
        job.display.say(f"compiling the network: {left} steps of {1000 * seconds:.0f} ms are left in this phase")
        learner.forward = compiled(learner.net)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate: its base rate times the factor of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def poll(job: Job, learner: Learner, state: State) -> None:
    """Read the sums of the steps since the last poll, over all processes; display and record them.

    This is the only wait for the device within an epoch. Raises NonFiniteError.
    """
    sums = check_finite(job, learner, state)
    learner.tally.values.zero_()
    added = (sums.loss, sums.weight, sums.correct, sums.images)
    state.sums = [a + b for a, b in zip(state.sums, added, strict=True)]
    rates = rates_now(learner.optimizer)
    shown = {"loss": f"{sums.mean_loss:.4f}", "top1": f"{sums.top1:.4f}"}
    row: dict[str, Any] = {"step": state.steps_done, "epoch": state.epochs_done + 1, "phase": state.phase + 1}
    row |= {"loss": sums.mean_loss, "top1": sums.top1, "lr": rates}
    if job.accelerator.scaler is not None:
        row["skipped"] = state.skipped
        shown |= {"skipped": str(state.skipped)} if state.skipped else {}
    job.display.advance(state.step_in_epoch, shown, int(sums.images))
    job.run.append_step(row)
    tracked = {f"lr/{name}": rate for name, rate in rates.items()}
    job.accelerator.log({"train/loss": sums.mean_loss, "train/top1": sums.top1, **tracked}, step=state.steps_done)
    limit = job.plan.cfg.run.time_limit
    if limit is not None and on_main(job.accelerator, lambda: time.monotonic() - state.started > 60 * limit):
        state.stopped_by = "time limit"


def check_finite(job: Job, learner: Learner, state: State) -> Sums:
    """The tally summed over all processes. Raises NonFiniteError on all of them if something is not finite.

    It also sets the state's number of steps that fp16 skipped in the phase.
    """
    on_device = job.accelerator.reduce(learner.tally.values.clone(), "sum")
    *values, skipped = read_values(torch.cat([on_device, learner.skipped[None]]), job.stop)  # one wait for the device
    sums, state.skipped = Sums(*values), int(skipped)
    if sums.nonfinite or not math.isfinite(sums.loss):
        what = "a gradient" if math.isfinite(sums.loss) else "the loss"
        newest = newest_state(job.run.path / "checkpoints")
        saved = f"the last checkpoint ({newest}) is finite" if newest else "no checkpoint was written yet"
        raise NonFiniteError(
            f"{what} became infinite or NaN in the steps before step {state.steps_done}; it did not reach the "
            f"parameters, and {saved}; {way_out(job.accelerator)}"
        )
    return sums


def check_that_a_step_was_taken(job: Job, state: State) -> None:
    """Raise NonFiniteError if fp16 skipped every step of the phase that ends: nothing was learned in it."""
    steps = state.epoch_in_phase * job.train_loader.steps_per_epoch + state.step_in_epoch
    if 0 < steps == state.skipped:
        raise NonFiniteError(
            f"a gradient was infinite or NaN in each of the {steps} steps of phase {state.phase + 1}: all of them "
            f"were skipped, and nothing was learnt; {way_out(job.accelerator)}"
        )


def way_out(accelerator: Accelerator) -> str:
    """What to try if something is not finite."""
    other = "" if accelerator.scaler is None else ", or take --mixed-precision bf16 or no"
    return f"lower --lr or set --clip-grad{other}"


def finish_epoch(job: Job, learner: Learner, state: State) -> None:
    """Validate, keep the best checkpoint, record the epoch, and save a checkpoint to resume from if one is due."""
    own = learner.source
    with job.display.busy(f"epoch {state.epochs_done + 1}: validating"):
        records = {"raw": validate(job, own.val_module, own.val_loader, own.val_input)}
        if job.ema is not None:
            records["ema"] = validate(job, job.ema.module, job.val_loader, job.to_input)
        scores = on_main(job.accelerator, lambda: {kind: headline(found) for kind, found in records.items()})
    learner.schedule.end_epoch(scores["raw"]["loss"])
    row = state.end_epoch()
    metric = job.plan.cfg.run.best_metric
    kind = max(scores, key=lambda kind: goodness(metric, scores[kind]))
    is_best = goodness(metric, scores[kind]) > (goodness(metric, state.best.score) if state.best else -math.inf)
    if is_best:
        state.best = Best(scores[kind], state.epochs_done, kind)
        state.best_records = records[kind] if is_float32(job, own if kind == "raw" else None) else None
        keep_best(job, state.best)
    state.epochs_since_best = 0 if is_best else state.epochs_since_best + 1
    if 0 < job.plan.cfg.run.patience <= state.epochs_since_best:
        state.stopped_by = state.stopped_by or "patience"
    report_epoch(job, state, row, scores, is_best)
    every = job.plan.cfg.run.save_every
    is_end = state.epochs_done == job.plan.cfg.run.epochs or state.stopped_by is not None
    if is_end or (every.unit == "epochs" and state.epochs_done % every.value == 0):
        save(job, learner, state)


def validate(job: Job, model: nn.Module, loader: EvalLoader, to_input: Input) -> Records:
    """The records of the validation images, at the run's precision; the same on every process."""
    classes = job.plan.architecture.num_classes
    with averaged_statistics(job.accelerator, model):
        return collect_records(job.accelerator, model, loader, to_input, classes, False, job.stop.check)


def is_float32(job: Job, validated: Source | None) -> bool:
    """Whether validation was bit-equal to the evaluation at the end of a run, which has float32 and the whole network.

    Features before a convolutional stage are kept in another memory format, so the rest may round differently.
    """
    precise = job.accelerator.mixed_precision == "no"
    if job.accelerator.device.type == "cuda":
        precise = precise and not job.plan.cfg.system.tf32
    features = validated.val_input if validated is not None else None
    return precise and not (isinstance(features, Features) and features.example.ndim == 4)


def keep_best(job: Job, best: Best) -> None:
    """Write the best weights, raw or averaged, with the BatchNorm statistics with which they were scored."""
    source = job.ema.module if job.ema is not None and best.weights_kind == "ema" else job.model
    with averaged_statistics(job.accelerator, source):
        on_main(job.accelerator, lambda: save_best(job.run.best, source, job.plan.description(best)))


def goodness(metric: str, score: Mapping[str, float]) -> float:
    """The value of the metric, negated if lower is better; -inf if it is not finite, so that it is never the best."""
    value = score[metric] if BEST_METRICS[metric] == "max" else -score[metric]
    return value if math.isfinite(value) else -math.inf


def report_epoch(
    job: Job, state: State, learned: Mapping[str, float], scores: Mapping[str, Mapping[str, float]], is_best: bool
) -> None:
    """Print the epoch in one line, and add a row to metrics.csv."""
    names = {"raw": "val", "ema": "ema"}
    parts = [f"epoch {state.epochs_done}/{job.plan.cfg.run.epochs}"]
    parts.append(f"train loss {learned['loss']:.4f} top1 {learned['top1']:.4f}")
    parts += [f"{names[kind]} loss {s['loss']:.4f} top1 {s['top1']:.4f}" for kind, s in scores.items()]
    parts.append(f"{learned['images_per_second']:.1f} images/s" + ("  *best*" if is_best else ""))
    parts += [f"fp16 skipped {counted(state.skipped, 'step')} of this phase"] if state.skipped else []
    job.display.say("  ".join(parts))
    row: dict[str, Any] = {"epoch": state.epochs_done, "phase": state.phase + 1, "step": state.steps_done}
    row |= {f"train_{name}": value for name, value in learned.items()}
    for kind, score in scores.items():
        row |= {f"{names[kind]}_{name}": value for name, value in score.items()}
    job.run.append_epoch(row)
    tracked = {f"{names[kind]}/{name}": value for kind, score in scores.items() for name, value in score.items()}
    job.accelerator.log(tracked, step=state.steps_done)
