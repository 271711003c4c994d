"""The only training loop. Every technique is a value of its phases."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from resnet_dist.config import BEST_METRICS, Phase
from resnet_dist.data.transforms import Batch
from resnet_dist.distributed import on_main
from resnet_dist.errors import NonFiniteError
from resnet_dist.evaluate.metrics import headline
from resnet_dist.evaluate.records import evaluate
from resnet_dist.model.head import set_sample_keys
from resnet_dist.model.trainable import set_trainable, train_mode
from resnet_dist.options import kept
from resnet_dist.run_folder import RunFolder
from resnet_dist.train.checkpoint import Description, save_checkpoint
from resnet_dist.train.job import Best, Job, State
from resnet_dist.train.optim import build_optimizer, param_groups
from resnet_dist.train.schedule import Schedule


def train(job: Job) -> State:
    """Run every phase in order and keep the best checkpoint."""
    state = State()
    for number, phase in enumerate(job.cfg.phase):
        if state.stopped_by == "time limit":
            break
        state.phase, state.epoch_in_phase, state.epochs_since_best = number, 0, 0
        set_trainable(job.model, phase)
        schedule = Schedule(job.cfg.schedule, job.train_loader.steps_per_epoch, phase.epochs or 0)
        groups = param_groups(job.model, job.cfg.optim, phase)
        # The schedule is not prepared: Accelerate would step it once per process.
        net, optimizer = job.accelerator.prepare(job.model, build_optimizer(groups, job.cfg.optim))
        while state.epoch_in_phase < (phase.epochs or 0) and state.stopped_by is None:
            learned = train_one_epoch(job, net, optimizer, schedule, phase, state)
            state.epoch_in_phase += 1
            state.epochs_done += 1
            finish_epoch(job, schedule, state, learned)
        if state.stopped_by == "patience" and number + 1 < len(job.cfg.phase):
            state.stopped_by = None  # patience ends a phase; the next one has its own
        # A wrapper that stayed would be wrapped again by the next phase.
        job.model = job.accelerator.unwrap_model(net, keep_fp32_wrapper=False)
        job.accelerator.free_memory(net, optimizer)
    return state


def train_one_epoch(
    job: Job, net: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, phase: Phase, state: State
) -> dict[str, float]:
    """One epoch of optimizer steps. Returns its mean training loss and top1, over all processes, and its speed."""
    steps = job.train_loader.steps_per_epoch
    sums, window = [0.0] * 4, torch.zeros(4, device=job.accelerator.device)
    started = time.monotonic()
    train_mode(job.model, phase)
    with job.display.epoch(f"epoch {state.epochs_done + 1}/{job.cfg.run.epochs}", steps):
        for step, batches in enumerate(job.train_loader.epoch(state.epochs_done), 1):
            set_rates(optimizer, schedule.factor(state.epoch_in_phase * steps + step - 1))
            window += train_step(job, net, optimizer, batches)
            state.steps_done += 1
            if step % job.cfg.run.log_every == 0 or step == steps:
                values = poll(job, state, optimizer, window, step)
                sums = [a + b for a, b in zip(sums, values, strict=True)]
                window.zero_()
                check_time(job, state)
                if state.stopped_by is not None:
                    break
    seconds = time.monotonic() - started
    loss, weight, correct, count = sums
    return {"loss": loss / weight, "top1": correct / count, "images_per_second": count / seconds, "seconds": seconds}


def train_step(
    job: Job, net: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]
) -> torch.Tensor:
    """One optimizer step over the micro-batches of this process.

    The loss is the mean over the global batch, all micro-batches and processes together, whatever the weights of its
    samples. Returns float32 (4,) of this process, on the device: sum of losses, of weights, of correct, of samples.
    """
    accelerator = job.accelerator
    batches = [batch.to(accelerator.device) for batch in batches]
    mine, total = denominator(job, batches)
    sums = torch.zeros(2, device=accelerator.device)
    for number, batch in enumerate(batches):
        set_sample_keys(job.model, batch.keys)
        is_last = number == len(batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(net):
            logits = net(job.to_input(batch))
            numerator = job.loss.numerators(logits, batch).sum()
            # DDP averages gradients over the processes, so each brings its part times their number.
            accelerator.backward(numerator * (accelerator.num_processes / total))
        sums += torch.stack([numerator.detach(), (logits.detach().argmax(1) == batch.targets).sum()])
    if job.cfg.optim.clip_grad is not None:
        accelerator.clip_grad_norm_(net.parameters(), job.cfg.optim.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    if job.ema is not None:
        job.ema.update(job.model)
    count = sum(len(batch.targets) for batch in batches)
    return torch.stack([sums[0], torch.as_tensor(mine, device=sums.device), sums[1], sums.new_tensor(count)])


def denominator(job: Job, batches: Sequence[Batch]) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """The summed weights of the samples of a step: of this process, and of all of them."""
    weights = [job.loss.denominators(batch) for batch in batches]
    known = [weight.sum() for weight in weights if weight is not None]
    if not known:
        count = float(sum(len(batch.targets) for batch in batches))
        return count, count * job.accelerator.num_processes
    mine = torch.stack(known).sum()
    return mine, job.accelerator.reduce(mine, "sum")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate: its base rate times the factor of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def poll(
    job: Job, state: State, optimizer: torch.optim.Optimizer, window: torch.Tensor, step: int
) -> list[float]:
    """Read the sums of the steps since the last poll, over all processes; show them and write them down.

    This is the only wait for the device within an epoch. Raises NonFiniteError if the loss is no longer finite.
    """
    values: list[float] = job.accelerator.reduce(window, "sum").tolist()
    loss, weight, correct, count = values
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss became {loss} within the {job.cfg.run.log_every} steps before step {state.steps_done} "
            f"(lr {' '.join(f'{name}={lr:g}' for name, lr in rates.items())}); lower --lr or set --clip-grad"
        )
    job.display.advance(step, {"loss": f"{loss / weight:.4f}", "top1": f"{correct / count:.4f}"}, int(count))
    row = {"step": state.steps_done, "epoch": state.epochs_done + 1, "phase": state.phase + 1}
    job.run.append_step({**row, "loss": loss / weight, "top1": correct / count, "lr": rates})
    return values


def check_time(job: Job, state: State) -> None:
    """Notice that --time-limit is over, on all processes alike."""
    limit = job.cfg.run.time_limit
    if limit is not None and on_main(job.accelerator, lambda: time.monotonic() - state.started > 60 * limit):
        state.stopped_by = "time limit"


def finish_epoch(job: Job, schedule: Schedule, state: State, learned: dict[str, float]) -> None:
    """Validate, keep the best, and write the epoch down."""
    scores = {"raw": validate(job, job.model)}
    if job.ema is not None:
        scores["ema"] = validate(job, job.ema.module)
    schedule.end_epoch(scores["raw"]["loss"])
    kind = max(scores, key=lambda kind: _goodness(job, scores[kind]))
    is_best = _goodness(job, scores[kind]) > (_goodness(job, state.best.score) if state.best else -math.inf)
    if is_best:
        best = state.best = Best(scores[kind], state.epochs_done, kind)
        state.epochs_since_best = 0
        on_main(job.accelerator, lambda: save_best(job.run, job, best))
    else:
        state.epochs_since_best += 1
        if job.cfg.run.patience and state.epochs_since_best >= job.cfg.run.patience:
            state.stopped_by = state.stopped_by or "patience"
    report_epoch(job, state, learned, scores, is_best)


def validate(job: Job, model: nn.Module) -> dict[str, float]:
    """The headline metrics on the validation images, under the run's precision."""
    records = evaluate(
        job.accelerator, model, job.val_loader, job.to_input, job.architecture.num_classes, full_precision=False
    )
    return headline(records)


def _goodness(job: Job, score: Mapping[str, float]) -> float:
    """Higher is better, whatever the metric's direction; a NaN is never better than anything."""
    name = job.cfg.run.best_metric
    value = score[name] if BEST_METRICS[name] == "max" else -score[name]
    return value if math.isfinite(value) else -math.inf


def save_best(run: RunFolder, job: Job, best: Best) -> None:
    """best.safetensors: the weights that scored best, raw or averaged. On the main process."""
    source = job.ema.module if job.ema is not None and best.weights_kind == "ema" else job.model
    description = Description(
        architecture=job.architecture,
        classes=job.index.classes,
        preprocessing=job.spec,
        config=kept(job.cfg),
        epoch=best.epoch,
        score=best.score,
        weights_kind=best.weights_kind,
    )
    save_checkpoint(run.best, source.state_dict(), description)


def report_epoch(
    job: Job, state: State, learned: dict[str, float], scores: dict[str, dict[str, float]], is_best: bool
) -> None:
    """A line for the user, a row for metrics.csv."""
    parts = [f"epoch {state.epochs_done}/{job.cfg.run.epochs}"]
    parts.append(f"train loss {learned['loss']:.4f} top1 {learned['top1']:.4f}")
    parts += [f"{_name_of(kind)} loss {s['loss']:.4f} top1 {s['top1']:.4f}" for kind, s in scores.items()]
    parts.append(f"{learned['images_per_second']:.1f} images/s" + ("  *best*" if is_best else ""))
    job.display.say("  ".join(parts))
    row: dict[str, Any] = {"epoch": state.epochs_done, "phase": state.phase + 1, "step": state.steps_done}
    row |= {f"train_{name}": value for name, value in learned.items()}
    for kind, score in scores.items():
        row |= {f"{_name_of(kind)}_{name}": value for name, value in score.items()}
    job.run.append_epoch(row)


def _name_of(kind: str) -> str:
    return "val" if kind == "raw" else "ema"
