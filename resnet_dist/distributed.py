"""Start Accelerate the one right way, and the few things that processes say to each other."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

from resnet_dist import launcher
from resnet_dist.errors import ResnetDistError, UsageError

T = TypeVar("T")


def start(threads: int | None, seed: int, deterministic: bool = False) -> Accelerator:
    """The Accelerator of this run: device, processes, threads and seed.

    Raises UsageError where the launcher started several processes that do not know of each other: each would believe
    itself to be the main one and write the same files.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != launcher.world_size():
        raise UsageError(
            f"the launcher started {launcher.world_size()} processes, but this one sees {accelerator.num_processes}; "
            "without GPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m resnet_dist ..."
        )
    torch.set_num_threads(
        threads or launcher.threads_from_environment() or max(1, launcher.cores() // launcher.local_world_size())
    )
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """The result of `action`, which only the main process performs; its error, if any, is raised on every process.

    What reads or writes shared things (folders, downloads) goes through here, so that no process is left waiting for
    one that failed.
    """
    outcome: list[T | ResnetDistError | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except ResnetDistError as error:
            outcome[0] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], ResnetDistError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]
