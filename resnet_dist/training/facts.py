"""What run.json says of a run in addition to its status: what is trained, on what data, by which launches."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from resnet_dist.config.schema import TrainConfig
from resnet_dist.data.transforms import Transform
from resnet_dist.files.run import read_facts
from resnet_dist.model.published import of_settings
from resnet_dist.model.resnet import empty
from resnet_dist.runtime.machine import made_with, peak_memory
from resnet_dist.training.plan import Plan


def what_is_trained(plan: Plan) -> dict[str, Any]:
    """Seed, batch, data fingerprint, and the parameters that learn in at least one phase, as plain JSON values.

    The fingerprint: a hash of every path, class and split, and the size of all files together.
    """
    cfg, index, model = plan.cfg, plan.index, empty(plan.architecture)
    learning = {name for phase in plan.phases for name in phase.trainable}
    data = index.fingerprint()
    parts = (index.train, index.val, index.test)
    size = sum((index.root / path).stat().st_size for part in parts for path in part.paths)
    custom = {} if plan.train_transform is None else {"train_transform": described(plan.train_transform)}
    return {
        **custom,
        "weights": _published(plan.cfg),
        "recipe": cfg.recipe,
        "model": cfg.model.model,
        "seed": cfg.run.seed,
        "global_batch": plan.share.global_batch,
        "data": {"images": data["images"], "bytes": size, "sha256": data["sha256"]},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(p.numel() for name, p in model.named_parameters() if name in learning),
    }


def _published(cfg: TrainConfig) -> dict[str, str]:
    """What is known of the initial weights: `license` and `base_model`, the repository with them on the Hub."""
    if cfg.run.init_from is not None:
        old = read_facts(Path(cfg.run.init_from)).get("weights", {}) if Path(cfg.run.init_from).is_dir() else {}
        return {name: str(old[name]) for name in ("license", "base_model") if isinstance(old, dict) and name in old}
    said = of_settings(cfg.model)
    known = {"license": said.license, "base_model": said.base_model}
    return {name: value for name, value in known.items() if value is not None}


def described(transform: Transform) -> str:
    """A user's transform as it is recorded: the name of a function, otherwise its repr."""
    name = getattr(transform, "__qualname__", None)
    return f"{getattr(transform, '__module__', '')}.{name}" if name else repr(transform)[:2000]


def this_launch(command: str) -> dict[str, Any]:
    """How this process was started and what it runs on, as plain JSON values; a run has one for every start."""
    state = AcceleratorState()
    return {
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": state.num_processes,
        "device": state.device.type,
        "precision": state.mixed_precision,
        "threads": torch.get_num_threads(),
        **made_with(),
    }


def largest_peak_memory(accelerator: Accelerator) -> dict[str, int]:
    """The peak memory of the process that used most, in MiB, on the host and on its GPU."""
    own = peak_memory()
    peaks = torch.tensor([list(own.values())], device=accelerator.device)
    largest = accelerator.gather(peaks).amax(dim=0).tolist()
    return dict(zip(own, largest, strict=True))
