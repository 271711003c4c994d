"""Reliability: the confidence of a model compared with its accuracy."""

from dataclasses import dataclass

import numpy as np

from resnet_dist.evaluation.records import Records

BINS = 15


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """int64 (n,): the number of the bin of each confidence, out of 15 equal bins (low, high] of 0..1."""
    return np.digitize(confidence.astype(np.float64), np.linspace(0, 1, BINS + 1)[1:-1], right=True)


@dataclass(frozen=True)
class Reliability:
    """Number of images, mean confidence and accuracy of each of 15 bins of confidence, (15,). NaN for an empty bin."""

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error, in 0..1: mean |accuracy - confidence| over the images (Guo et al. 2017)."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(self.images * gaps) / self.images.sum())


def reliability(records: Records) -> Reliability:
    """Compare the confidence of the best class with the accuracy, bin by bin."""
    confidence = records.probabilities[:, 0].astype(np.float64)
    bins = bins_of(confidence)
    images = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, v, BINS) for v in (confidence, records.prediction == records.target)]
    means = [np.divide(part, images, out=np.full(BINS, np.nan), where=images > 0) for part in sums]
    return Reliability(images, *means)
