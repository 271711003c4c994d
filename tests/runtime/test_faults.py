"""What goes wrong on one process or one device: everybody knows of it, in words that help."""

import errno
from typing import Any

import pytest
import torch
from torch import nn

from resnet_dist.errors import DataError, MachineError, ResnetDistError
from resnet_dist.runtime import accelerate as distributed
from resnet_dist.runtime.accelerate import model_from_main, on_main
from resnet_dist.runtime.faults import finding_each_other, is_out_of_memory, machine_errors, memory_for

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.distributed.DistBackendError("NCCL error: Failed to CUDA calloc async 608 bytes"),
    torch.distributed.DistBackendError("NCCL error: unhandled cuda error. Last error:\nCuda failure 2 'out of memory'"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. out of shared memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
]


class Process:
    """An Accelerator of one of two processes."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank: int) -> None:
        self.is_main_process = rank == 0


def process(rank: int) -> Any:
    return Process(rank)


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error)[:40])
def test_every_message_about_memory_is_recognised(error: Exception) -> None:
    """It is not reported as a lost process, and the remedy fits the place where memory ran out."""
    with pytest.raises(MachineError) as raised, machine_errors(process(0), 8, 3):
        raise error
    assert str(raised.value) == "cpu: out of memory with 8 images per process; try --batch-size 4 --grad-accum 6"
    with pytest.raises(MachineError) as raised, machine_errors(process(0)):
        raise error
    assert str(raised.value) == "cpu: out of memory"
    features = memory_for(process(0), "the kept features", "take --cache-features off")
    with pytest.raises(MachineError) as raised, machine_errors(process(0), 8, 3), features:
        raise error
    assert str(raised.value) == "cpu: out of memory for the kept features; take --cache-features off"


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_errors_that_are_not_a_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), memory_for(process(0), "x", "y"):
        raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), "out of memory .* Tried to allocate"),
        (
            torch.AcceleratorError("CUDA error: invalid device ordinal\nCUDA kernel"),
            "the GPU .* invalid device ordinal$",
        ),
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error"), "the GPU .* unhandled cuda error$"),
        (torch.distributed.DistStoreError("1/2 clients joined"), r"the 2 processes .* could not connect \(1/2"),
        (RuntimeError("Gloo connectFullMesh failed"), "could not connect"),
        (RuntimeError("wait timeout after 600000ms"), "could not connect"),
        (RuntimeError("a bug"), None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_at_the_start_of_accelerate(
    error: Exception, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of it is that the processes do not find each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MachineError if words else type(error), match=words), finding_each_other():
        raise error


def test_device_side_assert() -> None:
    assertion = torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be")
    words = r"device-side assert triggered.*CUDA_LAUNCH_BLOCKING=1"
    with pytest.raises(MachineError, match=words), machine_errors(process(0), 8, 1):
        raise assertion


# What the main process does for all


def both(action: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What on_main gives, or raises, on the main process and on the other one."""
    sent: list[Any] = []
    outcomes = []
    monkeypatch.setattr(distributed, "send_from_main", lambda values: sent.extend(values))
    try:
        outcomes.append(on_main(process(0), action))
    except Exception as error:  # noqa: BLE001 - any is the outcome
        outcomes.append(error)

    def receive(values: list[Any]) -> None:
        values[:] = pickled(sent)

    monkeypatch.setattr(distributed, "send_from_main", receive)
    try:
        outcomes.append(on_main(process(1), lambda: pytest.fail("only the main process acts")))
    except Exception as error:  # noqa: BLE001
        outcomes.append(error)
    return outcomes[0], outcomes[1]


def pickled(values: list[Any]) -> list[Any]:
    """As they arrive at another process."""
    import pickle

    copied: list[Any] = pickle.loads(pickle.dumps(values))
    return copied


class UnsendableError(Exception):
    """An error that cannot be made again from its arguments."""

    def __init__(self, one: object, other: object) -> None:
        super().__init__(f"{one}\n{other}")


def failing(error: Exception) -> Any:
    def action() -> None:
        raise error

    return action


def test_every_error_of_the_main_process_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert both(lambda: {"a": 1}, monkeypatch) == ({"a": 1}, {"a": 1})
    assert both(lambda: None, monkeypatch) == (None, None)
    for error in (DataError("bad"), OSError(errno.ENOSPC, "No space left on device", "f.csv")):
        main, other = both(failing(error), monkeypatch)
        assert main is error and type(other) is type(error) and str(other) == str(error)
    bugs = (KeyError("x"), UnsendableError(1, lambda: None), UnicodeDecodeError("ascii", b"\xff", 0, 1, "no"))
    for bug in bugs:
        main, other = both(failing(bug), monkeypatch)
        assert main is bug and type(other) is ResnetDistError and other.shared
        assert str(other).startswith(f"the main process failed: {type(bug).__name__}: ") and "\n" not in str(other)


def test_only_the_main_process_loads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others build one and receive its tensors; no module is sent."""
    made = nn.BatchNorm1d(3)
    nn.init.constant_(made.weight, 7.0)
    made.running_mean.fill_(2.0)  # type: ignore[union-attr]
    sent: list[Any] = []
    monkeypatch.setattr(distributed, "send_from_main", lambda values: sent.extend(pickled(values)))

    def send(tensors: dict[str, torch.Tensor]) -> None:
        sent.append({name: tensor.clone() for name, tensor in tensors.items()})

    monkeypatch.setattr(distributed, "broadcast", send)
    model, origin = model_from_main(process(0), lambda: (made, 3), nn.BatchNorm1d)
    assert model is made and origin == 3 and not model.training
    assert sent[:2] == [3, None]

    def receive(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(sent[2][name])

    monkeypatch.setattr(distributed, "send_from_main", lambda values: values.__setitem__(slice(None), sent[:2]))
    monkeypatch.setattr(distributed, "broadcast", receive)
    with torch.no_grad():
        other, _ = model_from_main(process(1), lambda: pytest.fail("only the main process loads"), nn.BatchNorm1d)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), made.state_dict().values(), strict=True))
