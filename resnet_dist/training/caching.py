"""Where the decoded images of a run are kept: decided once, and opened by every process."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from resnet_dist.config.schema import TrainConfig
from resnet_dist.data.cache import ImageCache, bytes_needed, choose_tier, default_folder, disk_file, shares
from resnet_dist.data.loader import DeviceImages, EvalImages, Samples, TrainImages
from resnet_dist.errors import MachineError
from resnet_dist.runtime.accelerate import on_main
from resnet_dist.runtime.faults import memory_for


def cache_images(accelerator: Accelerator, cfg: TrainConfig, samples: Sequence[TrainImages | EvalImages]) -> str:
    """Let samples keep what they decode, and return a line that says where and why; every process must call this.

    Raises MachineError where what --cache asks for does not fit or cannot be opened.
    """
    readers = [one.reader for one in samples]
    folder = Path(cfg.data.cache_dir) if cfg.data.cache_dir else default_folder()
    tier = on_main(accelerator, lambda: choose_tier(cfg.data.cache, readers, cfg.run.epochs, folder))
    if tier.name == "none":
        return f"images are decoded in every epoch ({tier.why})"
    own = []
    if tier.name == "disk":
        files = [disk_file(folder, reader) for reader in readers]
    else:
        if accelerator.is_local_main_process:
            own = [os.memfd_create("resnet-dist") for _ in readers]
        # Files without a name, gone with the last process of the machine that has them open, however it ends.
        names = gather_object([[f"/proc/{os.getpid()}/fd/{number}" for number in own]])
        files = [Path(name) for name in names[accelerator.process_index - accelerator.local_process_index]]
    for one, file, room in zip(samples, files, shares(readers, tier.room), strict=True):
        one.read = ImageCache(one.reader, file, room)
    accelerator.wait_for_everyone()
    for number in own:
        os.close(number)
    where = f"in {folder}" if tier.name == "disk" else "in memory"
    return f"decoded images are kept {where} ({tier.why})"


def on_device(accelerator: Accelerator, cfg: TrainConfig, samples: TrainImages | EvalImages, workers: int) -> Samples:
    """The samples, with --cache device kept on this process's GPU where they are the same in every epoch.

    On a CPU, --cache device is --cache ram. Raises MachineError where they take more than half of the free memory of
    the GPU, and DataError where one cannot be decoded.
    """
    is_fixed = isinstance(samples, EvalImages) or samples.is_fixed
    if cfg.data.cache != "device" or accelerator.device.type != "cuda" or not is_fixed:
        return samples
    needed, free = bytes_needed(samples.reader), torch.cuda.mem_get_info(accelerator.device)[0]
    if needed > free / 2:
        raise MachineError(
            f"--cache device: {len(samples.table)} images take {needed >> 20} MiB, more than half of what is free on "
            f"{accelerator.device} ({free >> 20} MiB); take --cache ram"
        )
    with memory_for(accelerator, "--cache device", "take --cache ram"):
        return DeviceImages(samples, accelerator.device, workers)
