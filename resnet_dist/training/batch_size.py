"""The largest batch size that fits in the memory of a GPU, found by trying steps: `--batch-size auto`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from resnet_dist.config.schema import DEFAULT_BATCH_SIZE, TrainConfig
from resnet_dist.errors import MachineError
from resnet_dist.model.resnet import Architecture, build
from resnet_dist.model.trainable import select, set_trainable, train_mode, updating_batch_norms
from resnet_dist.runtime.faults import is_out_of_memory
from resnet_dist.training.ema import Ema
from resnet_dist.training.optim import PlannedOptimizer, build_optimizer

FIRST = 8
# Shares of the free memory that a step may take. The rest is for fragmentation, and with --cache device for the images,
# which take up to half of it.
SHARE, SHARE_WITH_IMAGES = 0.9, 0.45


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest even number up to `most` (even, at least 2) for which `fits` is true; 0 if it is false for 2.

    `fits` must be true for all numbers up to a limit and false above it. The search doubles the number until it does
    not fit, then bisects. The result is at most an eighth too low. From 64 on it is a multiple of 8, for the tensor
    cores of GPUs, and at most 8 or an eighth too low. `most` itself is returned if it fits.
    """
    size, good = min(FIRST, most), 0
    while fits(size):
        good = size
        if size == most:
            return most
        size = min(2 * size, most)
    bad, unit = size, 8 if good >= 64 else 2
    while bad - good > max(unit, good // 8):
        middle = (good + bad) // 2 // unit * unit
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def find_batch_size(
    accelerator: Accelerator,
    cfg: TrainConfig,
    architecture: Architecture,
    img_size: int,
    optimizer: PlannedOptimizer,
    images: int,
) -> tuple[int, str]:
    """The batch size per process for `--batch-size auto`, and the reason. `images` is the size of the training set.

    Every process must call this: each tries on its own GPU, and the smallest result is used by all. On a CPU nothing is
    tried: the default is used. Raises MachineError if not even two images fit.
    """
    device = accelerator.device
    if device.type != "cuda":
        return DEFAULT_BATCH_SIZE, f"batch size {DEFAULT_BATCH_SIZE} (automatic: only GPUs are measured)"
    parts = accelerator.num_processes * cfg.optim.grad_accum
    most = max(2, images // parts // 2 * 2)
    share = SHARE_WITH_IMAGES if cfg.data.cache == "device" else SHARE
    room = int(share * torch.cuda.mem_get_info(device)[0])
    held = torch.cuda.memory_reserved(device)

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        done = takes_steps(accelerator, cfg, architecture, (size, 3, img_size, img_size), optimizer)
        return done and torch.cuda.max_memory_reserved(device) - held <= room

    own = largest_that_fits(fits, most)
    torch.cuda.empty_cache()
    size = int(accelerator.gather(torch.tensor([own], device=device)).min())
    if size == 0:
        raise MachineError(f"{device}: out of memory with 2 images of {img_size} pixels; try --mixed-precision bf16")
    why = "all training images" if size == most else f"the largest that fits in {room / 2**30:.1f} GiB of GPU memory"
    rule = "" if cfg.optim.lr_base_size is not None else "; add --lr-base-size to scale the learning rates with it"
    return size, f"batch size {size} per process (automatic: {why}){rule}"


def takes_steps(
    accelerator: Accelerator,
    cfg: TrainConfig,
    architecture: Architecture,
    shape: tuple[int, ...],
    optimizer: PlannedOptimizer,
) -> bool:
    """Whether a training step of every phase fits in memory, with images of `shape` (B, 3, S, S).

    As in training, the network, its moving average, the optimizer's state and DDP's buffers are in memory. The network
    is a copy that is discarded, and the processes do not communicate.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            model = build(architecture).to(accelerator.device)
        average = Ema(model, cfg.run.ema_decay) if cfg.run.ema else None
        for phase in cfg.phase:
            set_trainable(model, select(model, phase.trainable))
            train_mode(model, updating_batch_norms(model, phase))
            _step(accelerator, model, average, shape, optimizer)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _step(
    accelerator: Accelerator, model: nn.Module, average: Ema | None, shape: tuple[int, ...], planned: PlannedOptimizer
) -> None:
    device, learning = accelerator.device, [p for p in model.parameters() if p.requires_grad]
    group = {"params": learning, "lr": 0.0, "weight_decay": planned.weight_decay}
    optimizer = build_optimizer([group], planned)
    buckets = [torch.empty_like(p) for p in learning] if accelerator.num_processes > 1 else []
    images = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
    with accelerator.autocast():
        logits = model(images)
        loss = F.cross_entropy(logits, torch.zeros(shape[0], dtype=torch.int64, device=device))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    if average is not None:
        average.update()
    buckets.clear()
