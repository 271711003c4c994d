"""Numbers from records, through scikit-learn where it has them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from resnet_dist.evaluate.records import Records


def headline(records: Records) -> dict[str, float]:
    """loss (mean cross-entropy, nats), top1, top5 and macro_f1, the last three in 0..1.

    top5 counts the target among the min(5, classes) best. macro_f1 is the mean over the classes that have images:
    a class without any has no recall.
    """
    present = np.unique(records.target)
    f1 = precision_recall_fscore_support(
        records.target, records.prediction, labels=present, average="macro", zero_division=0.0
    )[2]
    return {
        "loss": float(records.loss.mean(dtype=np.float64)),
        "top1": float((records.prediction == records.target).mean()),
        "top5": float((records.classes == records.target[:, None]).any(axis=1).mean()),
        "macro_f1": float(f1),
    }


def per_class(records: Records, classes: Sequence[str]) -> list[dict[str, Any]]:
    """For every class: name, images, precision, recall and f1 in 0..1; None where there are no images of it."""
    precision, recall, f1, images = precision_recall_fscore_support(
        records.target, records.prediction, labels=range(len(classes)), zero_division=0.0
    )
    return [
        {
            "class": name,
            "images": int(images[i]),
            "precision": float(precision[i]) if images[i] else None,
            "recall": float(recall[i]) if images[i] else None,
            "f1": float(f1[i]) if images[i] else None,
        }
        for i, name in enumerate(classes)
    ]


def confusion(records: Records, classes: Sequence[str]) -> np.ndarray:
    """int64 (classes, classes): rows are targets, columns predictions."""
    return np.asarray(confusion_matrix(records.target, records.prediction, labels=range(len(classes))))
