"""Start Accelerate, and communicate between processes."""

import ctypes
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast,
    gather_object,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.config.schema import SystemConfig
from resnet_dist.errors import MachineError, ResnetDistError, UsageError
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.faults import finding_each_other, first_line, machine_errors
from resnet_dist.runtime.machine import versions
from resnet_dist.runtime.signals import StopRequests
from resnet_dist.runtime.wording import counted, precision_name

T = TypeVar("T")
SAME_VERSIONS = ("resnet-dist", "torch", "torchvision")  # that all processes must have
OF_THE_MACHINE = ("threads", "workers", "cache_dir", "keep_memory")  # settings in which machines may differ
_on_cpu: dict[Any, Any] = {}  # the gloo group next to the default group of NCCL
HOOKS = {"none": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}


def start(cfg: SystemConfig, seed: int = 0, trackers: Sequence[str] = ()) -> tuple[Accelerator, str]:
    """Start Accelerate. Returns it and a line about processes, device, precision and threads, with reasons.

    Lines with WARNING follow if the setup is slow or unusual. Raises UsageError for a launch or a setting
    that cannot work, such as several processes that are not connected: each would write the same files. Raises
    MachineError if launcher variables are missing, or the processes cannot connect.
    """
    launcher.check()
    missing = sorted(set(trackers) - {str(tracker) for tracker in get_available_trackers()})
    if missing:
        raise UsageError(f"--tracker {missing[0]}: Accelerate does not support it, or its package is not installed")
    on_cpu = launcher.cpu_is_asked_for() or not torch.accelerator.is_available()
    check_gpus(on_cpu)
    precision, why_precision = choose_precision(cfg.mixed_precision, on_cpu)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first use
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # left by an earlier run in this process
    with finding_each_other():
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            step_scheduler_with_optimizer=False,
            log_with=list(trackers) or None,
            project_dir="." if trackers else None,  # required here; start_trackers sets the folder
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(minutes=cfg.dist_timeout)),
            ],
        )
        if accelerator.num_processes > 1:
            wait_on_cpu(timedelta(minutes=cfg.dist_timeout))
    accelerator.ddp_handler = ddp_settings(cfg, at_once=accelerator.device.type == "cuda")
    check_launch(accelerator.num_processes)
    warnings = [*launch_warnings(cfg.mixed_precision, precision, on_cpu), *compare_processes(accelerator, precision)]
    keep_memory = "avx512f" in launcher.cpu_flags() if cfg.keep_memory == "auto" else cfg.keep_memory == "on"
    if keep_memory and accelerator.device.type == "cpu":
        keep_freed_memory()
    threads, why_threads = choose_threads(cfg.threads)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    torch.backends.cudnn.benchmark = not cfg.deterministic  # the shapes in training do not change
    processes = accelerator.num_processes
    backend = f", {torch.distributed.get_backend()}" if processes > 1 else ""
    line = (
        f"{counted(processes, 'process')} on {accelerator.device.type}{backend}; "
        f"precision {precision_name(precision)} ({why_precision}); "
        f"{counted(threads, 'thread')} per process ({why_threads})"
    )
    return accelerator, "\n".join([line, *(f"WARNING: {warning}" for warning in warnings)])


@dataclass
class DdpSettings(DistributedDataParallelKwargs):  # type: ignore[misc]
    """Accelerate's settings of DDP, and one that it does not know.

    Attributes:
        batched_grad_copy: copy all gradients of a bucket into it by one operation and divide them by another, instead
            of one operation for each. torch divides then, instead of multiplying by the reciprocal of the number of
            processes: if that is no power of two, the last bit may differ.
    """

    batched_grad_copy: bool = False


def ddp_settings(cfg: SystemConfig, at_once: bool) -> DdpSettings:
    """The settings of DDP. `at_once`: copy gradients at once if this torch can (2.15 can, 2.11 cannot)."""
    return DdpSettings(
        gradient_as_bucket_view=True,
        comm_hook=HOOKS[cfg.ddp_comm_hook],
        batched_grad_copy=at_once and "batched_grad_copy" in inspect.signature(DistributedDataParallel).parameters,
    )


def check_gpus(on_cpu: bool) -> None:
    """Raise UsageError if there are more processes on this machine than visible GPUs: each needs its own."""
    if on_cpu or not torch.cuda.is_available():
        return
    visible, (needed, is_exact) = torch.cuda.device_count(), launcher.processes_here()
    if needed > visible:
        at_least = "" if is_exact else "at least "
        raise UsageError(
            f"{at_least}{needed} processes on this machine, but this one sees {counted(visible, 'GPU')} "
            f"({launcher.visible_gpus()}); start at most {visible}, and make all GPUs visible to every process: with "
            "srun --gpus-per-node, not --gpus-per-task; a process sees only one MIG slice"
        )


def launch_warnings(asked: str, chosen: str, on_cpu: bool) -> Iterator[str]:
    """Warnings about launcher options that had no effect or make training slow."""
    if launcher.is_one_of_several():
        yield (
            "accelerate launch was configured for several processes (it set MASTER_ADDR and MASTER_PORT) but started "
            "one; on CPUs use --config_file launch/cpu.yaml instead of --cpu, on GPUs --multi_gpu"
        )
    if on_cpu and chosen == "bf16" and not launcher.cpu_has_bf16():
        yield "this CPU has no bf16 and emulates it, which is several times slower than --mixed-precision no"
    slow = asked == "auto" and chosen == "no" and not on_cpu and torch.cuda.is_available()
    if slow and torch.cuda.is_bf16_supported(including_emulation=False):
        yield (
            "the launcher sets mixed precision to no, its default, but this GPU has bf16, about twice as fast: use "
            "accelerate launch --mixed_precision bf16, or --mixed-precision bf16 after the verb"
        )


def compare_processes(accelerator: Accelerator, precision: str) -> list[str]:
    """A warning if processes have different GPUs of the same compute capability.

    Raises UsageError, on every process, if they have different precisions, versions or kinds of GPU: their gradients
    are averaged.
    """
    if accelerator.num_processes == 1:
        return []
    device, on_gpu = accelerator.device, accelerator.device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else device.type
    own = {"precision": precision, "device": name, "kind": str(on_gpu and torch.cuda.get_device_capability(device))}
    facts = gather_object([own | {package: versions().get(package, "none") for package in SAME_VERSIONS}])
    values = {what: ranks_by_value([one[what] for one in facts]) for what in facts[0]}
    differ = {what: in_words(ranks) for what, ranks in values.items() if len(ranks) > 1}
    problems = []
    if "precision" in differ:
        common = "bf16" if "fp16" not in values["precision"] else "fp16"
        problems.append(
            f"the processes chose different precisions ({differ['precision']}); give all of them the same, such as "
            f"--mixed-precision {common}"
        )
    for package in filter(differ.__contains__, SAME_VERSIONS):
        problems.append(
            f"the processes have different versions of {package} ({differ[package]}); install the same on all machines"
        )
    if "kind" in differ:
        problems.append(f"the processes have different kinds of GPU ({differ['device']}); start it on GPUs of one kind")
    if problems:
        raise UsageError(problems)
    return [f"the processes have different devices: {differ['device']}"] if "device" in differ else []


def compare_settings(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Raise UsageError, on every process, if the processes have different settings, by section and name.

    Those that may depend on the machine are not compared.
    """
    if accelerator.num_processes == 1:
        return
    own = {
        name: str(value)
        for section, values in settings.items()
        for name, value in (values if isinstance(values, dict) else {section: values}).items()
        if name not in OF_THE_MACHINE
    }
    facts = gather_object([own])
    problems = []
    for name in sorted(set().union(*facts)):
        values = ranks_by_value([one.get(name, "not given") for one in facts])
        if len(values) > 1:
            option = f"--{name.replace('_', '-')}"
            problems.append(
                f"the processes have different settings of {option} ({in_words(values)}); give all of them the same"
            )
    if problems:
        raise UsageError(problems)


def ranks_by_value(values: Sequence[str]) -> dict[str, list[int]]:
    """The ranks that have each value."""
    return {value: [rank for rank, one in enumerate(values) if one == value] for value in sorted(set(values))}


def in_words(ranks: Mapping[str, Sequence[int]]) -> str:
    """Such as "bf16 on rank 0, 1; fp16 on rank 2"."""
    return "; ".join(f"{value} on rank {', '.join(map(str, numbers))}" for value, numbers in ranks.items())


def keep_freed_memory() -> None:
    """Let malloc keep freed memory for the next tensors, from now on. Works with glibc only.

    By default glibc maps every block above 32 MiB newly and returns the top of its heap, so that pages are zeroed and
    mapped again: 100,000 of them in a step of resnet18 (224 pixels, batch 32), 10 to 20 % of its time on a virtual
    machine. Keeping the memory raises the peak by up to a fifth, as blocks of all sizes share it. Source: mallopt(3).
    """
    trim_threshold, mmap_max = -1, -4  # their names in malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    with suppress(AttributeError, OSError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def start_trackers(accelerator: Accelerator, folder: Path, config: Mapping[str, Any]) -> None:
    """Start the trackers, if any, with their files in `folder`."""
    if accelerator.log_with:
        accelerator.project_configuration.logging_dir = str(folder)
        flat = {f"{s}.{n}": v for s, part in config.items() if isinstance(part, dict) for n, v in part.items()}
        plain = {name: v if isinstance(v, str | int | float) else str(v) for name, v in flat.items()}
        accelerator.init_trackers("resnet-dist", config=plain)


def leave_job() -> None:
    """Close the connections to the other processes, at the end of a program. A Python caller may still need them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share_tensors(accelerator: Accelerator, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """Send named tensors from the main process to every process. The other processes pass None."""
    if accelerator.num_processes == 1:
        return tensors or {}
    shapes = on_main(accelerator, lambda: {name: (t.shape, t.dtype) for name, t in (tensors or {}).items()})
    shared = {}
    for name, (shape, dtype) in shapes.items():
        tensor = tensors[name] if tensors else torch.empty(shape, dtype=dtype)
        shared[name] = tensor.to(accelerator.device).contiguous()
    broadcast(shared)
    return {name: tensor.cpu() for name, tensor in shared.items()}


def check_launch(processes: int) -> None:
    """Raise UsageError if Accelerate sees a different number of processes than the launcher started."""
    if processes != launcher.world_size():
        raise UsageError(
            f"the launcher started {launcher.world_size()} processes, but this one sees {processes}; use "
            f"accelerate launch --multi_gpu --num_processes {launcher.world_size()} -m resnet_dist train ... "
            "(without GPUs, put ACCELERATE_USE_CPU=true before it)"
        )


def choose_precision(asked: str, on_cpu: bool) -> tuple[str, str]:
    """The precision of training, and why. Raises UsageError for fp16 on a CPU, where it is very slow."""
    from_launcher = launcher.mixed_precision()
    if asked != "auto":
        chosen, why = asked, "--mixed-precision"
    elif from_launcher is not None:
        chosen, why = from_launcher, "set by accelerate launch; --mixed-precision overrides it"
    elif on_cpu:
        chosen, why = ("bf16", "this CPU has it") if launcher.cpu_has_bf16() else ("no", "this CPU has no bf16")
    elif torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        chosen, why = ("bf16", "this GPU has it") if has_bf16 else ("fp16", "this GPU has no bf16")
    else:
        chosen, why = "no", "neither a CPU nor CUDA"
    if chosen == "fp16" and on_cpu:
        raise UsageError(f"fp16 ({why}) needs a GPU; on a CPU use --mixed-precision bf16 or no")
    return chosen, why


def choose_threads(asked: int | None) -> tuple[int, str]:
    """CPU threads per process, and why.

    `accelerate launch` sets OMP_NUM_THREADS=1 on machines without GPUs, which halves the speed on two cores. A 1 in a
    launched process is therefore ignored, even if the user set it.
    """
    if asked is not None:
        return asked, "--threads"
    from_environment = launcher.omp_threads()
    if from_environment is not None and (from_environment > 1 or not launcher.is_launched()):
        return from_environment, "OMP_NUM_THREADS"
    share = max(1, launcher.cores() // launcher.local_world_size())
    why = f"{counted(launcher.cores(), 'core')} / {counted(launcher.local_world_size(), 'process')} here"
    if from_environment is not None and share > 1:
        why += ", instead of OMP_NUM_THREADS=1, which launchers set; --threads changes it"
    return share, why


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on the main process. Its result is returned, or its error raised, on every process.

    Use it to read or write shared files and for decisions that must be the same everywhere. No process waits for one
    that failed. Our own errors and OSError are the same on every process. Any other error is a bug: the main process
    raises it unchanged, and the others raise a ResnetDistError that names it.
    """
    failure: Exception | None = None
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            if isinstance(error, ResnetDistError):
                error.shared = True
            if accelerator.num_processes == 1:
                raise
            failure, outcome[1] = error, _for_others(error)
    if accelerator.num_processes > 1:
        with machine_errors(accelerator):
            send_from_main(outcome)
    if failure is not None or outcome[1] is not None:
        raise failure or outcome[1]
    result: T = outcome[0]
    return result


def send_from_main(values: list[Any]) -> None:
    """Replace the values by those of the main process, on every process.

    With NCCL the processes wait in a group of their own on the CPU: waiting in NCCL would keep the GPU busy, and a lost
    process would be noticed only after the timeout.
    """
    group = torch.distributed.group.WORLD
    torch.distributed.broadcast_object_list(values, src=0, group=_on_cpu.get(group, group))


def wait_on_cpu(timeout: timedelta) -> None:
    """Let `send_from_main` wait on the CPU if the processes are connected by NCCL. Every process must call this."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        group = torch.distributed.group.WORLD
        if group not in _on_cpu:
            _on_cpu[group] = torch.distributed.new_group(backend="gloo", timeout=timeout)


def _for_others(error: Exception) -> Exception:
    """The error that the other processes raise. It must be picklable."""
    if isinstance(error, ResnetDistError):
        return error
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return OSError(error.errno, error.strerror, error.filename and str(error.filename))
    bug = ResnetDistError(f"the main process failed: {type(error).__name__}: {first_line(error)}")
    bug.shared = True
    return bug


def wrap(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and the optimizer, prepared by Accelerate; each process keeps its own BatchNorm buffers."""
    if accelerator.ddp_handler is not None:
        # The set of trained parameters is fixed within a phase. With no_sync a static graph fails in torch's reducer.
        accelerator.ddp_handler.static_graph = accumulate == 1
    net, prepared = accelerator.prepare(model, optimizer)
    if isinstance(net, DistributedDataParallel):
        net.broadcast_buffers = False  # set here, as the argument of this name is deprecated in torch 2.15
    return net, prepared


def share_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Move a network to the device, and copy the parameters and buffers of the main process to all others."""
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        with machine_errors(accelerator):
            broadcast(dict(model.state_dict()))


def model_from_main(
    accelerator: Accelerator, load: Callable[[], tuple[nn.Module, T]], build: Callable[[T], nn.Module]
) -> tuple[nn.Module, T]:
    """Load a network on the main process and send it to every process, on its device and in evaluation mode.

    Returns the network and its origin (such as the description of a checkpoint). The other processes build an empty
    network from the origin and receive the weights.
    """
    loaded: list[nn.Module] = []

    def load_one() -> T:
        model, origin = load()
        loaded.append(model)
        return origin

    origin = on_main(accelerator, load_one)
    model = loaded[0] if loaded else build(origin)
    share_weights(accelerator, model)
    return model.eval(), origin


def read_values(tensor: torch.Tensor, stop: StopRequests) -> list[float]:
    """The values of a tensor of shape (N,), after waiting for its device. Every process calls this at the same point.

    The wait for a GPU happens in Python, so that signals are handled. Raises RuntimeError if another process ended,
    as the GPU would then wait forever.
    """
    on_host = tensor
    if tensor.device.type == "cuda":
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        on_host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        wait_until(copied.query, stop.pulse())
    values: list[float] = on_host.tolist()
    return values


def wait_until(is_done: Callable[[], bool], look: Callable[[], None]) -> None:
    """Wait, and call `look` meanwhile."""
    while not is_done():
        look()
        time.sleep(0.0005)


def check_in_step(accelerator: Accelerator, model: nn.Module) -> None:
    """Check that all processes have bit-identical parameters.

    Raises MachineError that names the first parameter that differs.
    """
    if accelerator.num_processes == 1:
        return
    sums = [
        parameter.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for parameter in model.parameters()
    ]
    all_sums = accelerator.gather(torch.stack(sums)[None])
    differs = (all_sums != all_sums[0]).any(dim=0).cpu()
    if differs.any():
        names = [name for name, _ in model.named_parameters()]
        first = names[int(differs.nonzero()[0])]
        raise MachineError(
            f"the processes no longer have the same parameters ({int(differs.sum())} differ, first {first}); "
            "resume from the last checkpoint, and check the machines"
        )
