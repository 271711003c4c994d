"""Convert failures of the machine, which torch reports in many ways, to a MachineError with one line."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from resnet_dist.errors import MachineError, disk_error
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.wording import counted

# gloo and NCCL have a dozen messages for a lost process; each contains one of these.
LOST_PROCESS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
NOT_FOUND = ("store", "timeout", "connect")
OF_CUDA = ("cuda error", "cuda failure", "hip error")
NO_MEMORY = (
    "out of memory",
    "alloc_failed",
    "cuda calloc",
    "cuda malloc",
    "can't allocate memory",
    "cannot allocate memory",
    "memoryallocation",
)


@contextmanager
def machine_errors(accelerator: Accelerator, batch_size: int = 0, accumulate: int = 1) -> Iterator[None]:
    """In this context, a lack of memory or disk, or a lost process or loader, raises MachineError with a remedy.

    `batch_size` is the batch size of a training step, 0 for any other work.
    """
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise _out_of_memory(accelerator, batch_size, accumulate) from None
        raise disk_error(error) or error from None
    except (RuntimeError, MemoryError, torch.distributed.DistError) as error:
        if isinstance(error, RuntimeError) and (loader := lost_loader(error)):
            raise loader from None
        if is_out_of_memory(error):
            raise _out_of_memory(accelerator, batch_size, accumulate) from None
        if "device-side assert" in str(error):
            raise MachineError(
                f"{accelerator.device}: a GPU kernel got an invalid value ({first_line(error)}); run again "
                "with CUDA_LAUNCH_BLOCKING=1 to see where"
            ) from None
        if accelerator.num_processes == 1 or not any(word in str(error) for word in LOST_PROCESS):
            raise
        raise MachineError(f"another process of the run ended or hangs: {first_line(error)}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, cuDNN, cuBLAS, NCCL or the system means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in NO_MEMORY)


def _out_of_memory(accelerator: Accelerator, batch_size: int, accumulate: int) -> MachineError:
    if not batch_size:
        return MachineError(f"{accelerator.device}: out of memory")
    smaller = f"--batch-size {max(1, batch_size // 2)} --grad-accum {2 * accumulate}"
    return MachineError(
        f"{accelerator.device}: out of memory with {counted(batch_size, 'image')} per process; try {smaller}"
    )


@contextmanager
def memory_for(accelerator: Accelerator, what: str, remedy: str) -> Iterator[None]:
    """In this context, a lack of memory raises MachineError with `what` did not fit and the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(f"{accelerator.device}: out of memory for {what}; {remedy}") from None


@contextmanager
def finding_each_other() -> Iterator[None]:
    """In this context, processes that cannot connect and GPUs that do not work raise MachineError."""
    try:
        yield
    except (RuntimeError, torch.distributed.DistError) as error:
        if launcher.world_size() == 1:
            raise
        message = str(error).lower()
        if is_out_of_memory(error):
            raise MachineError(f"out of memory when Accelerate starts: {first_line(error)}") from None
        if any(word in message for word in OF_CUDA):
            raise MachineError(f"the GPU does not work when Accelerate starts: {first_line(error)}") from None
        is_lost = isinstance(error, torch.distributed.DistError)
        if not is_lost and not any(word.lower() in message for word in (*LOST_PROCESS, *NOT_FOUND)):
            raise
        raise MachineError(
            f"the {launcher.world_size()} processes of the run could not connect ({first_line(error)}); check that "
            "all were started and can reach MASTER_ADDR and MASTER_PORT"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error message, at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200]


def lost_loader(error: RuntimeError) -> MachineError | None:
    """The MachineError for a loader process that ended, or None. torch can raise such an error at any line."""
    if "DataLoader worker" not in str(error):
        return None
    reason = str(error).partition("\n")[0]
    return MachineError(f"a loader process ended ({reason}); if memory ran out, lower --workers")
