"""What one process of N finds; run by test_equality.py through the real launcher, N being 1, 2 or 3.

Every scenario has the same global batch whatever N is, so that everything that the processes find together must not
depend on N.
"""

import hashlib
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import nn

import resnet_dist.training.loop as loop
from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.data.loader import EvalImages, EvalLoader
from resnet_dist.data.transforms import ToInput
from resnet_dist.errors import MachineError, UsageError
from resnet_dist.evaluation.collect import collect_records
from resnet_dist.model.batch_norm import averaged_statistics, running_statistics
from resnet_dist.model.head import dropout_mask
from resnet_dist.runtime.accelerate import check_in_step, compare_settings, ddp_settings, on_main, start, wait_on_cpu
from resnet_dist.runtime.display import Display
from resnet_dist.training import caching
from resnet_dist.training.job import Job
from tests.conftest import TINY
from tests.runtime.launch import finish
from tests.training.helpers import config_of, job_of

GLOBAL_BATCH = 24
COMMON = [*TINY, "--global-batch-size", str(GLOBAL_BATCH), "--log-every", "1", "--batch-norm-stats", "frozen"]
COMMON += ["--save-every", "1000epochs"]  # what is compared is not on the disk
HARD = (
    "--grad-accum 2 --class-weights balanced --mixup 0.4 --head mlp --dropout 0.3 --aug trivial --label-smoothing 0.1"
)
SCENARIOS = {
    "sgd": f"--opt sgd --lr 0.02 --epochs 2 --sched cosine {HARD}",
    "focal": "--opt sgd --lr 0.02 --epochs 1 --loss focal --class-weights balanced --cutmix 1.0 --clip-grad 0.5",
    "adam": f"--opt adam --lr 1e-3 --epochs 1 --ema {HARD}",
    "adamw": "--opt adamw --lr 1e-3 --epochs 1",
    "rmsprop": "--opt rmsprop --lr 1e-3 --epochs 1",
    "adagrad": "--opt adagrad --lr 1e-2 --epochs 1",
}
SCHEDULES = ["step", "multistep", "cosine", "onecycle", "plateau", "constant"]
OF_THREE = ("sgd", "focal", "step")  # what three processes show that two do not: how data is divided, not the optimizer


def recorded(job: Job) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Train, and note the gradient of the first optimizer step: after all-reduce, before it is used."""
    first: list[torch.Tensor] = []
    build = loop.build_optimizer

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build(*arguments)

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if not first:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                first.append(torch.cat([p.grad.flatten() for p in parameters]).clone())

        optimizer.register_step_pre_hook(note)
        return optimizer

    loop.build_optimizer = watched
    try:
        state = loop.train(job)
    finally:
        loop.build_optimizer = build
    return state.to_dict(), first


def train_scenario(out: Path, data: Path, name: str, options: str) -> dict[str, Any]:
    job = job_of(out / f"run-{name}", data, *COMMON, *options.split())
    state, gradient = recorded(job)
    check_in_step(job.accelerator, job.model)
    parameters = torch.cat([p.detach().flatten() for p in job.model.parameters()])
    return {"gradient": gradient[0], "parameters": parameters, "best": state["best"]}


def batches(out: Path, data: Path) -> list[list[dict[str, Any]]]:
    """By optimizer step, what this process would feed the network: samples, pixels, mixing and dropout masks."""
    job = job_of(out / "run-batches", data, *COMMON, *SCENARIOS["sgd"].split(), "--aug", "randaug", "--erasing", "0.5")
    steps = []
    for epoch in (0, 3):
        for step in job.train_loader.epoch(epoch):
            found = []
            for batch in step:
                masks = dropout_mask(batch.keys, 64, 0.5, layer=0)
                for row, pixels in enumerate(job.to_input(batch)):
                    digest = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
                    mask = "".join("1" if bit else "0" for bit in masks[row].tolist())
                    share = batch.mix[row].tolist() if batch.mix is not None else []
                    found.append({"index": int(batch.index[row]), "pixels": digest, "mask": mask, "mix": share})
            steps.append(found)
    return steps


def rates(out: Path, data: Path, schedules: Sequence[str]) -> None:
    """A run of each schedule, of the head alone; the rates are read from metrics.jsonl."""
    for name in schedules:
        options = ["--sched", name, "--epochs", "4", "--trainable", "head", "--lr-step-size", "3steps"]
        options += ["--lr-milestones", "1,5steps", "--plateau-patience", "0", "--lr", "1e-9", "--opt", "sgd"]
        loop.train(job_of(out / f"rates-{name}", data, *COMMON, *options, "--aug", "none"))


class Fixed(nn.Module):
    """A network that needs no training: logits are sums of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        nn.init.eye_(self.fc.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean(dim=(2, 3)))


def evaluations(data: Path) -> dict[str, Any]:
    """The same weights on n images, for every n up to more than two rounds of three processes with batches of 2."""
    cfg = config_of(data, *COMMON)
    accelerator, _ = start(cfg.system)
    from export.predict import Preprocessing
    from resnet_dist.data.index import read_index

    table, spec = read_index(cfg.data).train, Preprocessing(img_size=16, resize=18)
    found = {}
    for n in range(1, 2 * 3 * 2 + 2):
        part = ImageTable(table.root, PathTable([table.paths[i] for i in range(n)]), table.targets[:n])
        world, rank = accelerator.num_processes, accelerator.process_index
        loader = EvalLoader(EvalImages(part, spec), 2, 0, False, world=world, rank=rank)
        records = collect_records(
            accelerator, Fixed(), loader, ToInput(spec, accelerator.device), 3, full_precision=True
        )
        values = {"target": records.target, "loss": records.loss, "classes": records.classes}
        found[str(n)] = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    return found


def statistics(out: Path, data: Path) -> dict[str, Any]:
    """BatchNorm's statistics: own while training, means within `averaged_statistics`, own again after it.

    And those of the average of the weights: how far the largest is from the average that is computed here.
    """
    options = ["--epochs", "2", "--lr", "0.01", "--batch-norm-stats", "update", "--ema"]
    job = job_of(out / "run-statistics", data, *COMMON, *options)
    assert job.ema is not None
    ema, update = job.ema, job.ema.update
    by_hand = {name: value.clone() for name, value in running_statistics(job.model).items()}

    def watched() -> None:
        update()
        decay = min(ema.decay, (1 + ema.steps) / (10 + ema.steps))
        for name, value in running_statistics(job.model).items():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * value

    ema.update = watched  # type: ignore[method-assign]
    loop.train(job)
    averages = running_statistics(ema.module)
    off = max(float((averages[name] - by_hand[name]).abs().max()) for name in averages)
    flat = [torch.cat([b.flatten() for b in running_statistics(job.model).values()])]
    with averaged_statistics(job.accelerator, job.model):
        flat.append(torch.cat([b.flatten() for b in running_statistics(job.model).values()]))
    flat.append(torch.cat([b.flatten() for b in running_statistics(job.model).values()]))
    return {"off": off, **dict(zip(("own", "mean", "after"), flat, strict=True))}


def copies(out: Path, data: Path) -> dict[str, Any]:
    """A run whose gradients are copied one by one into DDP's buckets, as on CPUs, and one as on GPUs."""
    found: dict[str, Any] = {}
    for accumulate in ("1", "2"):
        for at_once in (False, True):
            options = ["--epochs", "1", "--lr", "0.01", "--grad-accum", accumulate]
            job = job_of(out / f"run-copies-{accumulate}-{at_once}", data, *COMMON, *options)
            job.accelerator.ddp_handler = ddp_settings(job.plan.cfg.system, at_once)
            flags: list[bool] = []
            wrap = loop.wrap

            def noting(*arguments: Any, wrap: Any = wrap, flags: list[bool] = flags) -> Any:
                net, optimizer = wrap(*arguments)
                flags.append(getattr(net, "batched_grad_copy", False))
                return net, optimizer

            loop.wrap = noting
            try:
                _, gradient = recorded(job)
            finally:
                loop.wrap = wrap
            parameters = torch.cat([p.detach().flatten() for p in job.model.parameters()])
            found[f"{accumulate} {at_once}"] = {"gradient": gradient[0], "parameters": parameters, "flags": flags}
    return found


def spread(out: Path, data: Path) -> dict[str, Any]:
    """Training with --augment-on device, with all images in each process, and with a part of them in each.

    What the network gets in two epochs, one of them from its second step; the weights at the end; and what is printed.
    """
    options = "--epochs 2 --lr 0.01 --grad-accum 2 --cache device --augment-on device --color-jitter 0.3 --mixup 0.4"
    found: dict[str, Any] = {}
    for name, free in (("whole", 1 << 40), ("spread", None)):
        needed: list[int] = []

        def memory(_: torch.device, free: int | None = free, needed: list[int] = needed) -> int:
            return free or 2 * needed[0] - 2  # a little less than all images need

        def measured(*arguments: Any, measure: Any = caching.bytes_needed, needed: list[int] = needed) -> int:
            needed.append(measure(*arguments))
            return needed[-1]

        lines: list[str] = []
        with (
            patch.multiple(caching, bytes_needed=measured, _free_memory=memory),
            patch.object(Display, "say", lambda _, line, lines=lines: lines.append(line)),
        ):
            job = job_of(out / f"run-{name}", data, *COMMON, *options.split())
        loader = job.train_loader
        steps = [step for epoch, first in ((0, 0), (1, 1)) for step in loader.epoch(epoch, first)]
        inputs = torch.cat([job.to_input(batch) for step in steps for batch in step])
        loop.train(job)
        parameters = torch.cat([p.detach().flatten() for p in job.model.parameters()])
        kept = len(job.to_input.augment.pixels)  # type: ignore[union-attr]
        found[name] = {"inputs": inputs, "parameters": parameters, "pixels": kept, "said": "\n".join(lines)}
    return found


def on_main_next_to_nccl(accelerator: Accelerator) -> dict[str, Any]:
    """What `on_main` returns, and the group in which it waits, if the backend says that it is NCCL."""
    used: list[Any] = []
    send = torch.distributed.broadcast_object_list

    def noting(values: list[Any], src: int, group: Any) -> None:
        used.append(group)
        send(values, src=src, group=group)

    with (
        patch.object(torch.distributed, "get_backend", lambda: "nccl"),
        patch.object(torch.distributed, "broadcast_object_list", noting),
    ):
        for _ in range(2):  # a second start makes no second group
            wait_on_cpu(timedelta(minutes=7))
            answer = on_main(accelerator, lambda: {"from": accelerator.process_index})
    first, second = used
    is_own = first is second and first is not torch.distributed.group.WORLD
    minutes = first._get_backend(torch.device("cpu")).options._timeout / timedelta(minutes=1)
    return {"answer": answer, "is_own": is_own, "minutes": minutes}


def phases(out: Path, data: Path) -> dict[str, Any]:
    """Recipes that freeze and unfreeze: every process's parameters at the end, and that a difference is noticed."""
    found: dict[str, Any] = {}
    for recipe in ("head-then-all", "gradual-unfreeze"):
        options = ["--recipe", recipe, "--epochs", "4", "--phase", "1.epochs=1", "--global-batch-size", "24"]
        job = job_of(out / f"run-{recipe}", data, *TINY, *options)
        loop.train(job)
        found[recipe] = torch.cat([p.detach().flatten() for p in job.model.parameters()])
    if job.accelerator.process_index == 1:
        with torch.no_grad():
            job.model.layer2[0].conv1.weight[0, 0, 0, 0] += 1e-6  # type: ignore[index, union-attr]
    try:
        check_in_step(job.accelerator, job.model)
        found["noticed"] = "nothing"
    except MachineError as error:
        found["noticed"] = str(error)
    return found


def main() -> None:
    out, data = Path(sys.argv[1]), Path(sys.argv[2])
    accelerator, line = start(config_of(data, *COMMON).system)
    rank = accelerator.process_index
    result: dict[str, Any] = {"line": line, "settings": "the same"}
    try:
        compare_settings(accelerator, {"optim": {"lr": 0.1}, "data": {"workers": rank}})
        compare_settings(accelerator, {"optim": {"lr": 0.1 if rank == 0 else 0.2}})
    except UsageError as error:
        result["settings"] = str(error)
    wanted = OF_THREE if accelerator.num_processes == 3 else (*SCENARIOS, *SCHEDULES)
    if accelerator.num_processes > 1:
        result["on main"] = on_main_next_to_nccl(accelerator)
    for name in filter(wanted.__contains__, SCENARIOS):
        result[name] = train_scenario(out / f"rank{rank}", data, name, SCENARIOS[name])
    rates(out / f"rank{rank}", data, [name for name in SCHEDULES if name in wanted])
    result["batches"] = batches(out / f"rank{rank}", data)
    result["evaluations"] = evaluations(data)
    result["statistics"] = statistics(out / f"rank{rank}", data)
    if accelerator.num_processes > 1:
        result["spread"] = spread(out / f"rank{rank}", data)
    if accelerator.num_processes == 2:
        result["copies"] = copies(out / f"rank{rank}", data)
    result["phases"] = phases(out / f"rank{rank}", data)
    finish(out, rank, result)
    accelerator.end_training()


if __name__ == "__main__":
    main()
