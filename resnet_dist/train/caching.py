"""Where the decoded images of a run are kept: decided once, and opened by every process."""

import os
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from resnet_dist.config import TrainConfig
from resnet_dist.data.cache import ImageCache, choose_tier, default_folder, disk_file, shares
from resnet_dist.data.loader import EvalImages, TrainImages
from resnet_dist.distributed import on_main


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
