"""Evaluations that no network made, for tests of the page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from export.predict import Preprocessing
from resnet_dist.data.index import ImageTable, PathTable
from resnet_dist.evaluation.metrics import Measured, headline
from resnet_dist.evaluation.records import Records
from resnet_dist.evaluation.reliability import reliability
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.report.evaluation import write_evaluation
from resnet_dist.report.on_disk import read_evaluation

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', 'it\'s, "quoted" & @STYLE@ </style>')


def made_records(targets: np.ndarray, num_classes: int, seed: int = 0, right: float = 0.8) -> Records:
    """Records of random logits, in which about this share has the target as the best class."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(len(targets), num_classes))
    raised = generator.random(len(targets)) < right
    logits[np.arange(len(targets)), targets] += np.where(raised, 6, 0)
    logs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    best = np.argsort(-logs, axis=1)[:, : min(5, num_classes)]
    loss = -logs[np.arange(len(targets)), targets]
    return Records(targets, loss, best, np.exp(np.take_along_axis(logs, best, axis=1)))


def made_evaluation(
    folder: Path, classes: Sequence[str], images: int, side: int = 24, names: Sequence[str] = ()
) -> Evaluation:
    """An evaluation on disk of noise pictures in `folder`/images, with their records."""
    root, out = folder / "images", folder / "eval"
    targets = np.arange(images) % len(classes)
    paths = [names[i] if i < len(names) else f"{i:05d}.jpg" for i in range(images)]
    generator = np.random.default_rng(0)
    root.mkdir(parents=True)
    out.mkdir()
    for path, target in zip(paths, targets, strict=True):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        pixels[..., target % 3] //= 3
        (root / path).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / path, "JPEG")
    records = made_records(targets, len(classes))
    table = ImageTable(root, PathTable(paths), targets)
    values = {name: Measured(value, max(0.0, value - 0.1), value + 0.1) for name, value in headline(records).items()}
    evaluation = Evaluation(
        model=Path("best.safetensors"),
        table=table,
        split="val",
        classes=tuple(classes),
        spec=Preprocessing(img_size=16, resize=16),
        records=records,
        metrics=values,
        reliability=reliability(records),
        folder=out,
    )
    write_evaluation(out, evaluation)
    return read_evaluation(out, root, "val", classes, evaluation.spec)
