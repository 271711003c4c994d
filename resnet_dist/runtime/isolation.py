"""Restore the settings of the process that a run changes.

Two runs in one process then behave like two runs in separate processes.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from resnet_dist.runtime import environment as launcher

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
STATES = (PartialState, AcceleratorState, GradientState)


@contextmanager
def process_settings_restored() -> Iterator[None]:
    """Restore threads, determinism, TF32, random states and Accelerate's state when this context ends.

    In a process that a launcher started, Accelerate's state is kept: the processes remain one job.
    """
    restore_torch = _torch_settings()
    cublas = os.environ.get(CUBLAS)
    states = [dict(state._shared_state) for state in STATES]
    try:
        yield
    finally:
        restore_torch()
        if cublas is None:
            os.environ.pop(CUBLAS, None)
        if not launcher.is_distributed():
            for state, before in zip(STATES, states, strict=True):
                state._shared_state.clear()
                state._shared_state.update(before)


def _torch_settings() -> Callable[[], None]:
    """A function that restores the current settings of torch and all random states."""
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    restore_tf32 = _tf32_settings()

    def restore() -> None:
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        restore_tf32()

    return restore


def _tf32_settings() -> Callable[[], None]:
    """A function that restores the current TF32 settings through both interfaces of torch.

    `allow_tf32` cannot be read if the newer `fp32_precision` has a value that it cannot express.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    parts: tuple[Any, ...] = (matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    precisions = [part.fp32_precision for part in parts]
    flags: list[tuple[Any, bool]] = []
    for backend in (matmul, cudnn):
        with suppress(RuntimeError):
            flags.append((backend, backend.allow_tf32))

    def restore() -> None:
        for backend, flag in flags:
            backend.allow_tf32 = flag
        for part, precision in zip(parts, precisions, strict=True):
            if part.fp32_precision != precision:
                part.fp32_precision = precision

    return restore
