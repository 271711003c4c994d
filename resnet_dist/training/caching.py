"""Where the decoded images of a run are cached: one decision, then every process opens the cache."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from resnet_dist.config.schema import TrainConfig
from resnet_dist.data.cache import ImageCache, bytes_needed, choose_tier, default_folder, disk_file, readable, shares
from resnet_dist.data.device_augment import AugmentOnDevice, DrawnImages, KeptImages, SpreadImages, short_side
from resnet_dist.data.loader import DeviceImages, EvalImages, Samples, Share, TrainImages
from resnet_dist.errors import MachineError
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.accelerate import on_main
from resnet_dist.runtime.faults import memory_for


def cache_images(accelerator: Accelerator, cfg: TrainConfig, samples: Sequence[TrainImages | EvalImages]) -> str:
    """Let samples cache what they decode, and return a line that says where and why.

    Every process must call this. Raises MachineError if the cache that --cache asks for does not fit or cannot be
    opened.
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
        # Files without a name: they disappear when the last process of the machine that has them open ends.
        names = gather_object([[f"/proc/{os.getpid()}/fd/{number}" for number in own]])
        files = [Path(name) for name in names[accelerator.process_index - accelerator.local_process_index]]
    for one, file, room in zip(samples, files, shares(readers, tier.room), strict=True):
        one.read = ImageCache(one.reader, file, room)
    accelerator.wait_for_everyone()
    for number in own:
        os.close(number)
    where = f"in {folder}" if tier.name == "disk" else "in memory"
    return f"decoded images are kept {where} ({tier.why})"


def place_samples(
    accelerator: Accelerator,
    cfg: TrainConfig,
    train: TrainImages,
    val: EvalImages,
    workers: int,
    share: Share,
    say: Callable[[str], None],
) -> tuple[Samples, Samples, AugmentOnDevice | None]:
    """Where training and validation get their samples, by --cache and --augment-on, and what augments on the device.

    Every process must call this. Raises MachineError if the cache that --cache asks for does not fit, and DataError if
    an image that is to be kept on the device cannot be decoded.
    """
    wanted = cfg.augment.augment_on == "device" and not train.is_fixed
    kept = keep_for_augmenting(accelerator, train, workers, say) if wanted else None
    say(cache_images(accelerator, cfg, [train, val] if kept is None else [val]))
    train_samples, val_samples = (on_device(accelerator, cfg, one, workers) for one in (train, val))
    if kept is None:
        return train_samples, val_samples, None
    spread = kept.per_process < len(train.table)
    drawn = SpreadImages(train, kept, share) if spread else DrawnImages(train, kept.sizes)
    return drawn, val_samples, AugmentOnDevice(kept, train)


def keep_for_augmenting(
    accelerator: Accelerator, images: TrainImages, workers: int, say: Callable[[str], None]
) -> KeptImages | None:
    """The training images on this process's device: all of them if they take at most half of the free memory of each
    device, otherwise a part on each device, otherwise None.

    A printed line says which. All processes decide alike.
    """
    device, short, world = accelerator.device, short_side(images.spec), accelerator.num_processes
    needed, free = bytes_needed(images.reader, short), _free_memory(device)
    size = f"about {readable(needed)} of the {readable(free)} that are free on {device}"
    room = min(gather_object([free])) / 2
    too_much = f"because they take more than half of a device's free memory ({size})"
    if needed > world * room:
        say(f"--augment-on host for the training images, {too_much}")
        return None
    parts = world if needed > room else 1
    if parts == 1:
        say(f"training images are kept and augmented on {device}, short side at most {short} pixels ({size})")
    else:
        say(
            f"training images are spread over {parts} devices, {too_much}; each augments its part, short side at most "
            f"{short} pixels, and sends the others the crops that they need"
        )
    with memory_for(accelerator, "--augment-on device", "take --augment-on host"):
        return KeptImages(images, device, workers, parts, accelerator.process_index if parts > 1 else 0)


def _free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, for one process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return launcher.available_memory() // launcher.local_world_size()


def on_device(accelerator: Accelerator, cfg: TrainConfig, samples: TrainImages | EvalImages, workers: int) -> Samples:
    """The samples; with --cache device they are kept on this process's GPU if they are the same in every epoch.

    On a CPU, --cache device is --cache ram. Raises MachineError if they take more than half of the free memory of the
    GPU, and DataError if one cannot be decoded.
    """
    is_fixed = isinstance(samples, EvalImages) or samples.is_fixed
    if cfg.data.cache != "device" or accelerator.device.type != "cuda" or not is_fixed:
        return samples
    needed, free = bytes_needed(samples.reader), _free_memory(accelerator.device)
    if needed > free / 2:
        raise MachineError(
            f"--cache device: {len(samples.table)} images take {needed >> 20} MiB, more than half of what is free on "
            f"{accelerator.device} ({free >> 20} MiB); take --cache ram"
        )
    with memory_for(accelerator, "--cache device", "take --cache ram"):
        return DeviceImages(samples, accelerator.device, workers)
