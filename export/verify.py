"""The gate: a file is kept only if it reproduces PyTorch on real images, from the image file to the predicted class."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.predict import Predictor, Preprocessing, canonical_json
from resnet_dist.data.index import ImageTable
from resnet_dist.data.loader import EvalImages
from resnet_dist.data.transforms import Batch, ToInput
from resnet_dist.errors import DataError
from resnet_dist.evaluation.intervals import Z95, paired_drop, wilson
from resnet_dist.model.parts import cut
from resnet_dist.model.weights import sha256_of

LOGITS, PROBABILITIES = 1e-4, 1e-4  # LOGITS is relative to max(1, the largest logit)
FP16_AGREEMENT = 0.995
BATCHES = (1, 8)


@dataclass
class Equality:
    """The differences between the float32 file and PyTorch over `images` images. `problems`: reasons to refuse it."""

    images: int
    inputs_equal: bool = True
    max_logit_difference: float = 0.0
    max_logit: float = 0.0
    max_probability_difference: float = 0.0
    max_feature_difference: float | None = None
    top1_agreement: float = 1.0
    near_ties: int = 0
    accuracy_torch: float | None = None
    accuracy_onnx: float | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        same = "equal" if self.inputs_equal else "DIFFERENT"
        off, top1 = self.max_logit_difference, 100 * self.top1_agreement
        logits = f"logits within {off:.1e} (limit {LOGITS * max(1, self.max_logit):.0e})"
        return f"{self.images} images: inputs {same}, {logits}, top-1 equal on {top1:.2f} %"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the limits that were applied."""
        limits = {"logits": f"{LOGITS:g} * max(1, max_logit)", "probabilities": PROBABILITIES, "inputs": "bit-equal"}
        return {**asdict(self), "limits": limits, "batch_sizes": list(BATCHES)}


class Records:
    """The images of the gate, for `predict --verify --images`: sha256 of file and of pixels, and PyTorch's logits."""

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []

    def add(self, file: Path, pixels: np.ndarray, logits: np.ndarray) -> None:
        """Record one image: its pixels uint8 (S, S, 3) and its logits float32 (classes,)."""
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        numbers = [float(str(logit)) for logit in logits]  # the shortest text that gives the same float32
        self._images.append({"file": sha256_of(file), "pixels": digest, "logits": numbers})

    def save(self, file: Path, checkpoint_sha256: str, min_agreement: float) -> None:
        """Write gate.json. `min_agreement` is that of int8, in percent."""
        bounds = {"fp32": 1.0, "fp16": FP16_AGREEMENT, "int8": min_agreement / 100}
        gate = {"checkpoint_sha256": checkpoint_sha256, "min_agreement": bounds, "images": self._images}
        file.write_text(canonical_json(gate))


@torch.no_grad()
def in_torch(
    model: nn.Module, table: ImageTable, spec: Preprocessing
) -> Iterator[tuple[torch.Tensor, np.ndarray, list[int]]]:
    """Yield pixels of the training pipeline, uint8 (8, S, S, 3), their logits in PyTorch, and their rows in the table.

    Raises DataError.
    """
    images = EvalImages(table, spec)
    to_input = ToInput(spec, torch.device("cpu"))
    for start in range(0, len(table), max(BATCHES)):
        rows = range(len(table))[start : start + max(BATCHES)]
        batch = images.__getitems__(rows)
        if isinstance(batch, DataError):
            raise batch
        yield batch.images, np.asarray(model(to_input(batch)).float()), list(rows)


def check_equality(
    model: nn.Module,
    table: ImageTable,
    predictors: Sequence[Predictor],
    labelled: bool,
    temperature: float = 1.0,
    recorded: int = 64,
) -> tuple[list[Equality], Records]:
    """Compare the PyTorch pipeline with predictors: those of each written file and each runtime.

    All start from the image files. `model` is in float32 on the CPU, in evaluation mode. Its probabilities are
    computed at `temperature`. `labelled` says whether the table has real labels. Returns a result per predictor, and
    the records of `recorded` evenly spread images. Raises DataError if an image cannot be read.
    """
    results = [Equality(images=len(table)) for _ in predictors]
    best = np.zeros((len(predictors), 2, len(table)), np.int64)  # classes by PyTorch and by the predictor
    first = predictors[0]
    records, kept = Records(), set(table.spread(recorded))
    to_input = ToInput(first.preprocessing, torch.device("cpu"))
    for pixels, logits, rows in in_torch(model, table, first.preprocessing):
        names = [str(table.path(row)) for row in rows]
        loaded = np.stack([_loaded(first, name) for name in names])
        for place in (place for place, row in enumerate(rows) if row in kept):
            records.add(Path(names[place]), loaded[place], logits[place])
        for predictor, equality, classes in zip(predictors, results, best, strict=True):
            _compare_inputs(equality, predictor, to_input, pixels, loaded, names)
            for size in BATCHES:
                others = np.concatenate([predictor.logits(loaded[i : i + size]) for i in range(0, len(loaded), size)])
                _compare_outputs(equality, logits, others, predictor.probabilities(loaded), temperature, names)
            if predictor.has_features:
                features = cut(model, "head")[0](to_input(_batch_of(pixels)))
                _compare_features(equality, features, predictor.features(loaded), names)
            classes[:, rows] = logits.argmax(1), others.argmax(1)
    for equality, classes in zip(results, best, strict=True):
        _compare_classes(equality, classes, table.targets if labelled else None)
    return results, records


def _loaded(predictor: Predictor, name: str) -> np.ndarray:
    _, pixels, error = predictor.load(name)
    if pixels is None:
        raise DataError(f"{name}: {error}")
    return pixels


def _batch_of(pixels: torch.Tensor) -> Batch:
    zeros = torch.zeros(len(pixels), dtype=torch.int64)
    return Batch(pixels, zeros, zeros, zeros)


def _compare_inputs(
    equality: Equality,
    predictor: Predictor,
    to_input: ToInput,
    pixels: torch.Tensor,
    loaded: np.ndarray,
    names: list[str],
) -> None:
    """Require that the predictor's inputs equal those of training bit for bit."""
    (given,) = predictor.inputs(loaded).values()
    expected = np.asarray(pixels) if given.dtype == np.uint8 else np.asarray(to_input(_batch_of(pixels)))
    for row, name in enumerate(names):
        if not np.array_equal(given[row], expected[row]):
            equality.inputs_equal = False
            equality.problems.append(f"{name}: the input differs from that of training")


def _compare_features(equality: Equality, features: torch.Tensor, others: np.ndarray, names: list[str]) -> None:
    """Require that features are within the same relative tolerance as logits."""
    expected = np.asarray(features.detach())
    off, scale = np.abs(expected - others).max(axis=1), np.maximum(1.0, np.abs(expected).max(axis=1))
    equality.max_feature_difference = max(equality.max_feature_difference or 0.0, float(off.max()))
    wrong = np.flatnonzero(~(off <= LOGITS * scale))
    equality.problems += [f"{names[row]}: features are off by {off[row]:.1e}" for row in wrong]


def _compare_outputs(
    equality: Equality,
    logits: np.ndarray,
    others: np.ndarray,
    probabilities: np.ndarray,
    temperature: float,
    names: list[str],
) -> None:
    """Require close logits and probabilities, and the same best class unless it is a near tie."""
    difference, scale = np.abs(logits - others).max(axis=1), np.maximum(1.0, np.abs(logits).max(axis=1))
    expected = np.asarray((torch.from_numpy(logits) / temperature).softmax(1))
    off = np.abs(expected - probabilities).max(axis=1)
    ordered = np.sort(logits, axis=1)
    tie = ordered[:, -1] - ordered[:, -2] < 2 * difference if logits.shape[1] > 1 else np.zeros(len(logits), bool)
    equality.near_ties += int(tie.sum())
    equality.max_logit = max(equality.max_logit, float(np.abs(logits).max()))
    equality.max_logit_difference = max(equality.max_logit_difference, float(difference.max()))
    equality.max_probability_difference = max(equality.max_probability_difference, float(off.max()))
    for row, name in enumerate(names):
        if not difference[row] <= LOGITS * scale[row]:
            equality.problems.append(
                f"{name}: logits are off by {difference[row]:.1e}, more than {LOGITS * scale[row]:.1e}"
            )
        elif not off[row] <= PROBABILITIES:
            equality.problems.append(f"{name}: probabilities are off by {off[row]:.1e}, more than {PROBABILITIES:g}")
        elif logits[row].argmax() != others[row].argmax() and not tie[row]:
            equality.problems.append(f"{name}: the predicted class differs")


def _compare_classes(equality: Equality, classes: np.ndarray, targets: np.ndarray | None) -> None:
    """Require the same accuracy from the classes of PyTorch and onnxruntime, int64 (2, N), unless there are ties."""
    best, other = classes
    equality.top1_agreement = float((best == other).mean())
    if targets is None:
        return
    equality.accuracy_torch, equality.accuracy_onnx = (float((some == targets).mean()) for some in (best, other))
    if equality.accuracy_torch != equality.accuracy_onnx and equality.near_ties == 0:
        equality.problems.append(f"accuracy {equality.accuracy_onnx:.4f} instead of {equality.accuracy_torch:.4f}")


@dataclass
class Loss:
    """The loss of accuracy of a smaller file, measured on the same images as the float32 file."""

    images: int
    agreement: float  # share of images with the same top-1 as the float32 file
    agreement_interval: tuple[float, float]  # Wilson, 95 %
    min_agreement: float  # what the file must reach
    max_logit_difference: float
    accuracy_fp32: float | None = None
    accuracy: float | None = None
    accuracy_drop_interval: tuple[float, float] | None = None  # paired, 95 %, in 0..1
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        low, high = (100 * end for end in self.agreement_interval)
        text = f"{self.images} images: same top-1 as fp32 on {100 * self.agreement:.2f} %"
        text += f" (95 % interval {low:.1f} to {high:.1f} %)"
        if self.accuracy is None:
            return text
        text += f", accuracy {self.accuracy:.4f} (fp32 {self.accuracy_fp32:.4f}"
        if self.accuracy_drop_interval is not None:
            text += ", drop {:.1f} to {:.1f} points".format(*(100 * end for end in self.accuracy_drop_interval))
        return f"{text})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def compare_smaller(
    full: Path,
    small: Path,
    table: ImageTable,
    labelled: bool,
    max_accuracy_drop: float,
    min_agreement: float,
    providers: Sequence[str] = ("cpu",),
) -> dict[str, Loss]:
    """Compare a fp16 or int8 file, with each onnxruntime provider, with the float32 file on the CPU.

    fp16 must have the same top-1 on 99.5 % of the images. int8 must have the same top-1 on at least `min_agreement`
    percent, with 95 % confidence. int8 is also refused if its accuracy is lower by more than `max_accuracy_drop`
    (points) even at the lower end of the 95 % interval. Raises DataError if an image cannot be read.
    """
    threads = torch.get_num_threads()
    reference = Predictor(full, threads, "cpu")
    predictors = [Predictor(small, threads, name) for name in providers]
    logits, *others = _outputs_of(table, reference, *predictors)
    targets = table.targets if labelled else None
    precision = str(predictors[0].metadata["precision"])
    return {
        name: _loss(logits, other, targets, precision, max_accuracy_drop, min_agreement)
        for name, other in zip(providers, others, strict=True)
    }


def _loss(
    logits: np.ndarray,
    others: np.ndarray,
    targets: np.ndarray | None,
    precision: str,
    max_accuracy_drop: float,
    min_agreement: float,
) -> Loss:
    """What the smaller file with the logits `others` loses; both float32 (N, classes)."""
    best, other = logits.argmax(1), others.argmax(1)
    n, same = len(logits), int((best == other).sum())
    bound = min_agreement / 100 if precision == "int8" else FP16_AGREEMENT
    loss = Loss(n, same / n, wilson(same, n), bound, float(np.abs(logits - others).max()))
    if precision == "int8":
        loss.problems += judge_agreement(same, n, bound)
    elif loss.agreement < bound:
        loss.problems.append(
            f"fp16 has the same top-1 on {100 * loss.agreement:.2f} % of {n} images, less than {100 * bound} %"
        )
    if targets is not None:
        right, right_small = best == targets, other == targets
        loss.accuracy_fp32, loss.accuracy = float(right.mean()), float(right_small.mean())
        loss.accuracy_drop_interval = paired_drop(
            int((right & ~right_small).sum()), int((right_small & ~right).sum()), n
        )
        if precision == "int8" and 100 * loss.accuracy_drop_interval[0] > max_accuracy_drop:
            drop, (low, high) = loss.accuracy_fp32 - loss.accuracy, loss.accuracy_drop_interval
            interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f}"
            loss.problems.append(
                f"int8 loses {100 * drop:.2f} points of top-1 on {n} images ({interval}), more than the "
                f"{max_accuracy_drop:g} points that --max-accuracy-drop allows"
            )
    return loss


def _outputs_of(table: ImageTable, *predictors: Predictor) -> list[np.ndarray]:
    """The logits of each predictor, float32 (N, classes). Raises DataError."""
    outputs: list[list[np.ndarray]] = [[] for _ in predictors]
    for start in range(0, len(table), 16):
        names = [str(table.path(i)) for i in range(len(table))[start : start + 16]]
        loaded = np.stack([_loaded(predictors[0], name) for name in names])
        for predictor, rows in zip(predictors, outputs, strict=True):
            rows.append(predictor.logits(loaded))
    return [np.concatenate(rows) for rows in outputs]


def judge_agreement(same: int, n: int, bound: float) -> list[str]:
    """Test if `same` of `n` images with the same top-1 show an agreement of at least `bound` (0..1).

    Returns [] if they do, otherwise one reason. The lower end of the 95 % interval must reach the bound. If only the
    upper end reaches it, there are too few images to decide.
    """
    low, high = wilson(same, n)
    if low >= bound:
        return []
    required = f"{100 * bound:g} %"
    measured = f"int8 has the same top-1 as float32 on {same} of {n} images"
    measured += f" ({100 * same / n:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    if high < bound:
        return [f"{measured}, less than the {required} of --min-agreement"]
    needed = images_needed(same / n, bound)
    more = f"about {needed:,} such images would be enough" if needed else "more such images would not help"
    return [f"too few images to decide: {measured}, which does not prove the {required} of --min-agreement; {more}"]


def images_needed(share: float, bound: float) -> int | None:
    """The smallest number of images for which an agreement of `share` proves `bound` (both 0..1); None if none does.

    With that many images, the lower end of the Wilson interval reaches the bound.
    """
    return math.ceil(Z95**2 * bound * (1 - bound) / (share - bound) ** 2) if share > bound else None
