"""A short summary of an evaluation for the terminal and for notebooks."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from resnet_dist.evaluation.intervals import wilson
from resnet_dist.evaluation.metrics import confused_pairs
from resnet_dist.evaluation.result import Evaluation
from resnet_dist.evaluation.thresholds import abstained
from resnet_dist.runtime.wording import counted, listed, shortened

if TYPE_CHECKING:
    from resnet_dist.evaluation.calibrate import Calibration

Rows = Iterator[tuple[str, str]]
MOST_CONFUSED = 5


def title_of(evaluation: Evaluation) -> str:
    """The title of the table: the model and the images."""
    images = counted(len(evaluation), f"{evaluation.split} image")
    return f"{evaluation.model}: {images}, float32; 95 % intervals in brackets"


def summary_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(name, text) of the metrics, the most confused classes, the calibration, and the written files."""
    rows = [(name, str(metric)) for name, metric in evaluation.metrics.items()]
    calibration = evaluation.calibration
    if calibration is not None and calibration.temperature != 1:
        rows.append(("temperature", f"{calibration.temperature:.4f}"))
    rows += [("most confused", line) for line in confused_lines(evaluation)]
    if calibration is not None:
        rows += _calibration_rows(evaluation, calibration)
    if evaluation.folder is not None:
        rows += [("written to", str(evaluation.folder)), ("report", str(evaluation.folder / "report.html"))]
    return rows


def confused_lines(evaluation: Evaluation) -> list[str]:
    """The most confused pairs of classes, one line each."""
    pairs = confused_pairs(evaluation.confusion, evaluation.classes)[:MOST_CONFUSED]
    return [
        f"{shortened(pair['target'], 30)} as {shortened(pair['prediction'], 30)}: {pair['images']} "
        f"({100 * pair['share_of_target']:.0f} %)"
        for pair in pairs
    ]


def _calibration_rows(evaluation: Evaluation, calibration: "Calibration") -> Rows:
    if evaluation.calibration_file is not None:
        yield from _made(calibration)
        yield "calibration", str(evaluation.calibration_file)
        return
    if calibration.thresholds:
        yield "abstained", _abstained(evaluation, calibration)
    if evaluation.facts.get("calibrated_on_these_images"):
        yield from _optimistic(calibration.measured)


def _made(calibration: "Calibration") -> Rows:
    """The effect of a new calibration."""
    measured = calibration.measured
    if "note" in measured:
        yield "note", measured["note"]
    for name in ("loss", "ece"):
        before, after = measured[name]
        yield f"calibrated {name}", f"{before:.4f} before, {after:.4f} after (cross-fitted, like {name} above)"
    if calibration.thresholds:
        yield from _thresholds(calibration)
        yield "predictions kept", _kept(measured)


def _thresholds(calibration: "Calibration") -> Rows:
    """The number of classes with a threshold, and the classes that predict always abstains from."""
    measured, total = calibration.measured, len(calibration.thresholds)
    without = [row for row in measured["classes"] if row["threshold"] is None]
    yield (
        "thresholds",
        f"{total - len(without)} of {total} classes: precision at least {measured['precision']:g}, with "
        f"{100 * measured['confidence']:g} % confidence per class",
    )
    few = [row["class"] for row in without if row["images"] < measured["fewest_images"]]
    if few:
        yield "always abstained", f"{listed(few)}: predicted for fewer than {measured['fewest_images']} images"
    weak = [row["class"] for row in without if row["class"] not in few]
    if weak:
        yield "always abstained", f"{listed(weak)}: no threshold reaches the precision"


def _kept(measured: Mapping[str, Any]) -> str:
    """The effect of the thresholds on images that were not used to choose them."""
    kept, n = measured["cross_fitted"], measured["images"]
    if not kept["kept"]:
        return f"0 of {n} (cross-fitted over {measured['folds']} folds)"
    low, high = kept["precision_interval"]
    return (
        f"{kept['kept']} of {n}, their precision {kept['precision']:.4f} [{low:.4f}, {high:.4f}] (cross-fitted over "
        f"{measured['folds']} folds)"
    )


def _optimistic(measured: Mapping[str, Any]) -> Rows:
    """A warning that the model is evaluated on the images on which it was calibrated."""
    yield (
        "WARNING",
        "the calibration was fitted on these images, so loss, ece and the effect of abstaining look too good; "
        f"cross-fitted, loss is {measured['loss'][1]:.4f} and ece {measured['ece'][1]:.4f}",
    )
    if "cross_fitted" in measured:
        yield "predictions kept", _kept(measured)


def _abstained(evaluation: Evaluation, calibration: "Calibration") -> str:
    """The number of predictions below their threshold, and the accuracy of the others."""
    records = evaluation.records
    kept = ~abstained(records, calibration.thresholds)
    n, right = int(kept.sum()), int((records.prediction == records.target)[kept].sum())
    text = f"{len(records) - n} of {len(records)}"
    if n == 0:
        return text
    low, high = wilson(right, n)
    return f"{text}; top1 of the others {right / n:.4f} [{low:.4f}, {high:.4f}]"
