"""The training step on a GPU that is not there: FakeTensorMode knows shapes, types and devices, and computes nothing.

python -m tests.training.fake_cuda DATA FILE: FILE is JSON, cases by name: {"options": [...], "plant": a fault or null}.
For every case a line of JSON says what was noted: waits for the device, blocking copies, tensors on different devices,
each with the line of the project. It also has the number of operations that the step started on the device without its
backward pass (`launches`), and how many of them copy between host and device. An operation on many tensors at once,
such as `_foreach_lerp_`, counts as one, though CUDA may need a few kernels for it.

In a process of its own, for torch is patched: FakeTensors cannot be swapped into a module in place; backward asks CUDA
for a context, so every parameter gets an empty gradient instead; some fused kernels have no version without data. What
loads data works outside the mode. Numbers, pinned memory, streams and NCCL cannot be seen here.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import resnet_dist.evaluation.collect as collect
import resnet_dist.training.caching as caching
import resnet_dist.training.loop as loop
from resnet_dist.data.device_augment import DrawnImages, KeptImages
from resnet_dist.data.loader import TrainImages, TrainLoader
from resnet_dist.data.transforms import Batch
from resnet_dist.files.run import RunFolder
from resnet_dist.model.trainable import train_mode
from resnet_dist.runtime.accelerate import start
from resnet_dist.runtime.display import Display
from resnet_dist.runtime.signals import StopRequests
from resnet_dist.training.features import Features
from resnet_dist.training.job import Job, build_job
from resnet_dist.training.plan import Plan, make_plan
from tests.training.helpers import config_of

FREE_MEMORY = (70 << 30, 80 << 30)
WITHOUT_DATA = ["_fused_sgd_", "_fused_sgd_.tensor_lr", "_fused_adagrad_", "_fused_adagrad_.tensor_lr"]
WITHOUT_DATA += ["_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"]


WITHOUT_KERNEL = ("prim.", "profiler.", "aten.empty", "aten.as_strided")


class Watch(TorchDispatchMode):
    """Above the fake mode, so it sees every operation with its devices: counts them, and notes copies that block.

    `copies` are those between host and device, which are among the launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.copies = 0, 0
        self.noted: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.launches += not (func.is_view or str(func).startswith(WITHOUT_KERNEL))
        if func is torch.ops.aten._to_copy.default:
            source, target = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            self.copies += source != target
            if (source, target) == ("cuda", "cpu") or (source != target and not kwargs.get("non_blocking")):
                self.noted.append(f"a blocking copy from {source} to {target} at {own_line(traceback.extract_stack())}")
        return func(*args, **kwargs)


def own_line(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of the project, or of the fault that was planted."""
    own = [frame for frame in frames if "resnet_dist" in frame.filename or "PLANTED" in (frame.line or "")]
    return f"{Path(own[-1].filename).name}: {own[-1].line}" if own else "?"


def apply_to_module(
    self: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """nn.Module._apply without swapping tensors."""
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = function(parameter)
            if moved is not parameter:  # else the optimizer would keep parameters that are no longer the network's
                self._parameters[name] = nn.Parameter(moved.detach(), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def patch_torch() -> torch.library.Library:
    """Let torch work with a GPU that only fake tensors know of; the kernels stay as long as what is returned."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    for name in WITHOUT_DATA:
        first = (lambda *a, **k: a[0]) if name == "_amp_update_scale_" else (lambda *a, **k: None)
        library.impl(name, first)
    nn.Module._apply = apply_to_module  # type: ignore[assignment]
    _foreach_utils._foreach_supported_types.append(FakeTensor)  # as real tensors: many at once
    torch.cuda.mem_get_info = lambda device=None: FREE_MEMORY
    torch.cuda.is_bf16_supported = lambda *a, **k: True  # type: ignore[assignment]
    torch.cuda.device_count = lambda: 1
    caching.KeptImages = keep_images  # type: ignore[assignment,misc]
    caching.DeviceImages = lambda images, device, workers: images  # type: ignore[assignment,misc]
    torch.amp.grad_scaler.torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    return library


def keep_images(images: TrainImages, device: torch.device, workers: int, *part: int) -> KeptImages:
    """KeptImages of which the sizes are real: decoded outside of the mode."""
    with _disable_current_modes():
        kept = KeptImages(images, torch.device("cpu"), workers, *part)
    kept.pixels = torch.empty(kept.pixels.shape, dtype=torch.uint8, device=device)
    return kept


def accelerator_on_cuda(cfg: Any) -> Accelerator:
    """What `start` makes where there is a GPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState()
    PartialState._shared_state["device"] = torch.device("cuda:0")
    real = torch.accelerator.is_available
    torch.accelerator.is_available = lambda: True
    try:
        return start(cfg.system, cfg.run.seed)[0]
    finally:
        torch.accelerator.is_available = real


def begin(plan: Plan, accelerator: Accelerator, run: Path, mode: FakeTensorMode) -> tuple[Job, loop.Learner]:
    """The project's own job and learner, on cuda:0; backward gives every parameter that learns an empty gradient."""
    with mode:
        job = build_job(accelerator, plan, RunFolder(run), Display(False), StopRequests(), resumed=True)
        learner = loop.begin_phase(job, job.plan.phases[0])
        train_mode(job.model, learner.phase.updating)
        for feed in (learner.source.train_input, learner.source.val_input):
            if isinstance(feed, Features):
                rows = sum(len(view.table) for view in feed.views)
                feed.values = feed.example.new_empty(rows, *feed.example.shape[1:])

    def backward(loss: torch.Tensor, **_: Any) -> None:
        assert loss.device.type == "cuda" and loss.requires_grad
        if accelerator.scaler is not None:
            accelerator.scaler.scale(loss)
        for parameter in learner.net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    accelerator.backward = backward  # type: ignore[method-assign]
    return job, learner


def batches_of(learner: loop.Learner, job: Job, plan: Plan) -> list[list[Batch]]:
    """Real batches, made outside the mode."""
    if learner.source.train_loader is not job.train_loader:
        return list(learner.source.train_loader.epoch(0))
    images = TrainImages(plan.index.train, plan.spec, plan.cfg.augment, 0)
    kept = job.train_loader.samples
    samples = DrawnImages(images, kept.sizes) if isinstance(kept, DrawnImages) else images
    return list(TrainLoader(samples, plan.batches, 0, False).epoch(0))


def run_case(data: str, options: Sequence[str], plant: str | None) -> dict[str, Any]:
    """Two steps and, without a fault, an evaluation: what was noted, and the launches and copies of the second step."""
    cfg = config_of(data, *options)
    accelerator = accelerator_on_cuda(cfg)
    plan = make_plan(accelerator, cfg)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with tempfile.TemporaryDirectory() as folder, torch.autograd.set_multithreading_enabled(False):
        (Path(folder) / "checkpoints").mkdir()
        job, learner = begin(plan, accelerator, Path(folder), mode)
        undo = PLANTS[plant](job) if plant else None
        noted: list[str] = []
        for step in batches_of(learner, job, plan)[:2]:
            with mode:
                loop.set_rates(learner.optimizer, 1.0)
            watch = watched(mode, lambda step=step: loop.train_step(job, learner, step), noted)
        if undo:
            undo()
        elif not noted:
            evaluated(mode, job, noted)
    return {"noted": noted, "launches": watch.launches, "copies": watch.copies}


def watched(mode: FakeTensorMode, action: Callable[[], object], noted: list[str]) -> Watch:
    """Do it on the fake device; what it should not have done is added to `noted`."""
    watch = Watch()
    try:
        with mode, watch:
            action()
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        noted.append(f"a wait for the device at {own_line(traceback.extract_tb(error.__traceback__))}")
    except RuntimeError as error:
        if "device" not in str(error) and ".numpy()" not in str(error):
            raise
        noted.append(f"tensors on two devices, or a wait, at {own_line(traceback.extract_tb(error.__traceback__))}")
    noted += watch.noted
    return watch


def evaluated(mode: FakeTensorMode, job: Job, noted: list[str]) -> None:
    """The loop of an evaluation, without what reads its records in the end."""
    batches = list(job.val_loader)

    class Loader:
        rounds, samples, per_process = job.val_loader.rounds, job.val_loader.samples, job.val_loader.per_process

        def __iter__(self) -> Any:
            return iter(batches)

    class WithoutInference:  # constants of fake tensors do not go with it
        def __getattr__(self, name: str) -> Any:
            return torch.no_grad if name == "inference_mode" else getattr(torch, name)

    real = collect.torch, collect._gather, collect._in_order
    collect.torch = WithoutInference()  # type: ignore[assignment]
    collect._gather = lambda accelerator, rows, per: rows  # type: ignore[assignment]
    collect._in_order = lambda **columns: columns  # type: ignore[assignment]
    try:
        for full in (False, True):
            arguments: Any = (job.accelerator, job.model, Loader(), job.to_input, 3, full)
            watched(mode, lambda arguments=arguments: collect.collect_records(*arguments), noted)
    finally:
        collect.torch, collect._gather, collect._in_order = real  # type: ignore[assignment]


# Faults, one line each


def at_update(fault: Callable[[Job, loop.Learner], object]) -> Callable[[Job], Callable[[], None]]:
    """The fault happens in front of every optimizer step."""

    def plant(_: Job) -> Callable[[], None]:
        real = loop.update

        def update(job: Job, learner: loop.Learner) -> None:
            fault(job, learner)
            real(job, learner)

        loop.update = update
        return lambda: setattr(loop, "update", real)

    return plant


def branch(_: Job, learner: loop.Learner) -> None:
    if learner.tally.nonfinite > 0:  # PLANTED
        return


def weights_on_the_host(job: Job) -> Callable[[], None]:
    job.loss.weights = torch.ones(3)
    return lambda: None


def mean_on_the_host(job: Job) -> Callable[[], None]:
    job.to_input.rows.clear()
    job.to_input.mean = torch.zeros(3)
    return lambda: None


PLANTS: dict[str, Callable[[Job], Callable[[], None]]] = {
    "item": at_update(lambda _, learner: learner.tally.loss.item()),  # PLANTED
    "branch": at_update(branch),
    "cpu": at_update(lambda _, learner: learner.tally.values.cpu()),  # PLANTED
    "numpy": at_update(lambda _, learner: learner.tally.values.cpu().numpy()),  # PLANTED
    "nonzero": at_update(lambda _, learner: learner.tally.values.nonzero()),  # PLANTED
    "weights on the host": weights_on_the_host,
    "mean on the host": mean_on_the_host,
}


def main() -> None:
    """Every case, a line of JSON each."""
    library = patch_torch()
    for name, case in json.loads(Path(sys.argv[2]).read_text()).items():
        print(json.dumps({"name": name} | run_case(sys.argv[1], case["options"], case["plant"])), flush=True)
    del library


if __name__ == "__main__":
    main()
