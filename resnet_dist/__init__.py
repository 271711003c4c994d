"""Fine-tune a torchvision ResNet on a folder of images and ship it as ONNX.

    import resnet_dist as rd

    run = rd.train("photos", recipe="discriminative", epochs=10, output_dir="runs/photos")
    print(run.metrics["top1"].value, run.path)

Every function takes the options of its command as keywords, prints nothing unless `verbose=True`, and raises the errors
below. Importing the package is cheap: torch is imported by the function that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.label import predict
    from export.predict import Prediction, Predictor
    from export.run import Bundle, export
    from resnet_dist.data.check_report import CheckReport, check
    from resnet_dist.data.split_files import Split, split
    from resnet_dist.errors import (
        ArtifactError,
        DataError,
        MachineError,
        NonFiniteError,
        Preempted,
        ResnetDistError,
        UsageError,
    )
    from resnet_dist.evaluation.result import Evaluation
    from resnet_dist.evaluation.run import evaluate
    from resnet_dist.model.loading import Checkpoint, load_checkpoint
    from resnet_dist.report.compare import Comparison
    from resnet_dist.training.comparison import compare
    from resnet_dist.training.lr_find import LearningRates, lr_find
    from resnet_dist.training.result import Run, load_run
    from resnet_dist.training.run import train

__version__ = "0.1.0"

_MODULES = {  # what is public, by the module that has it
    "resnet_dist.training.run": ("train",),
    "resnet_dist.training.lr_find": ("LearningRates", "lr_find"),
    "resnet_dist.training.comparison": ("compare",),
    "resnet_dist.report.compare": ("Comparison",),
    "resnet_dist.training.result": ("Run", "load_run"),
    "resnet_dist.evaluation.result": ("Evaluation",),
    "resnet_dist.evaluation.run": ("evaluate",),
    "resnet_dist.model.loading": ("Checkpoint", "load_checkpoint"),
    "resnet_dist.data.check_report": ("CheckReport", "check"),
    "resnet_dist.data.split_files": ("Split", "split"),
    "resnet_dist.errors": (
        "ArtifactError",
        "DataError",
        "MachineError",
        "NonFiniteError",
        "Preempted",
        "ResnetDistError",
        "UsageError",
    ),
    "export.label": ("predict",),
    "export.predict": ("Prediction", "Predictor"),
    "export.run": ("Bundle", "export"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ArtifactError",
    "Bundle",
    "CheckReport",
    "Checkpoint",
    "Comparison",
    "DataError",
    "Evaluation",
    "LearningRates",
    "MachineError",
    "NonFiniteError",
    "Prediction",
    "Predictor",
    "Preempted",
    "ResnetDistError",
    "Run",
    "Split",
    "UsageError",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "export",
    "load_checkpoint",
    "load_run",
    "lr_find",
    "predict",
    "split",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'resnet_dist' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
