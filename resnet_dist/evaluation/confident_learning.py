"""Find labels that are probably wrong, from probabilities of models that were not trained on those labels.

Confident learning (Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR
2021). Validation images are judged by the trained model, training images by cross-validation (out of fold).
"""

from dataclasses import dataclass

import numpy as np

from resnet_dist.evaluation.intervals import lower_bound
from resnet_dist.evaluation.records import Records

# Strong regularisation, so that wrong labels are not learned: there are few images and 512 or 2,048 features.
REGULARISATION = 0.01
# The skill that a judge needs, from 0 (it always predicts the largest class) to 1 (it is always right). Simulated with
# 2 and 10 classes and 300 and 500 images: with 5 % wrong labels, 13 of 100 suspects are wrong labels at skill 0.45, and
# 60 of 100 at 0.7 to 0.75. Without wrong labels, a fifth of the images is suspected at 0.5, and one in 70 at 0.8.
LEAST_SKILL = 0.6
CONFIDENCE = 0.95
OUT_OF_FOLD = "classifiers that were fitted without the image"


@dataclass(frozen=True)
class Judge:
    """How well a model predicts the labels, and whether that is good enough to judge them.

    Attributes:
        right: the number of labels, out of `images`, that are predicted correctly.
        chance: the share of the largest class, 0..1: the accuracy of always predicting that class.
    """

    right: int
    images: int
    chance: float

    @classmethod
    def of(cls, right: np.ndarray, target: np.ndarray) -> "Judge":
        """`right`: bool (n,), which labels are predicted correctly. `target`: int64 (n,), the labels."""
        return cls(int(right.sum()), len(target), float(np.bincount(target).max()) / len(target))

    @property
    def low(self) -> float:
        """The lower confidence bound of the accuracy."""
        return lower_bound(self.right, self.images, CONFIDENCE)

    @property
    def needed(self) -> float:
        """The value that the lower bound must reach."""
        return self.chance + LEAST_SKILL * (1 - self.chance)

    @property
    def can_tell(self) -> bool:
        """Whether the accuracy is high enough to suspect labels."""
        return self.low >= self.needed

    def sentence(self, suspected: int, name: str) -> str:
        """The result in words. `name` says who judges the labels: "the network"."""
        predicted = f"{self.right:,} of {self.images:,} labels ({self.right / self.images:.2f})"
        if self.can_tell:
            return f"{suspected:,} labels are suspected. {predicted} are predicted correctly by {name}."
        return (
            f"Wrong labels cannot be identified: only {predicted} are predicted correctly by {name}. With "
            f"{100 * CONFIDENCE:g} % confidence this share is at least {self.low:.2f}, but {self.needed:.2f} is needed "
            f"(always predicting the largest class gives {self.chance:.2f}). More images or better weights may help."
        )


@dataclass(frozen=True)
class LabelErrors:
    """The assessment of each label, in the order of the images.

    Attributes:
        likely: int64 (n,), the most probable other class.
        quality: float64 (n,), the normalised margin in 0..1: (p of the label - p of the best other class + 1) / 2.
        suspected: bool (n,), whether the label is probably wrong; all False if the judge is not good enough.
        order: int64 (n,), positions sorted by suspicion: suspected labels first, then by rising quality.
        judge: how well the labels are predicted.
    """

    likely: np.ndarray
    quality: np.ndarray
    suspected: np.ndarray
    order: np.ndarray
    judge: Judge


def find(target: np.ndarray, probabilities: np.ndarray) -> LabelErrors:
    """Judge labels, int64 (n,), by probabilities, float (n, classes) in 0..1, of models not trained on these labels.

    An image is suspected if the confident joint counts it under another class and its label is not predicted. At most
    as many images are suspected as the joint estimates to be wrong.
    """
    rows = np.arange(len(target))
    of_label = probabilities[rows, target]
    others = probabilities.astype(np.float64)
    others[rows, target] = -np.inf
    best_other = others.argmax(axis=1)
    quality = (of_label - others[rows, best_other] + 1) / 2
    counted, estimated = confident_joint(target, probabilities)
    judge = Judge.of(quality >= 0.5, target)
    candidates = (counted != target) & (quality < 0.5)
    suspected = np.zeros(len(target), bool)
    if judge.can_tell:
        worst = np.argsort(np.where(candidates, quality, np.inf), kind="stable")
        suspected[worst[: min(int(candidates.sum()), round(estimated))]] = True
    return LabelErrors(
        likely=np.where(suspected, counted, best_other),
        quality=quality,
        suspected=suspected,
        order=np.lexsort((quality, ~suspected)),
        judge=judge,
    )


def confident_joint(target: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, float]:
    """The class under which the confident joint counts each image, int64 (n,), and the number of wrong labels.

    The threshold of a class is its mean probability over the images with that label. An image counts as its most
    probable class among those that reach their threshold; if there is none, it counts as its label. The number is an
    estimate: it scales the counts of each label to the number of images with that label.
    """
    rows, classes = np.arange(len(target)), probabilities.shape[1]
    images = np.bincount(target, minlength=classes)
    sums = np.bincount(target, weights=probabilities[rows, target], minlength=classes)
    thresholds = np.where(images > 0, sums / np.maximum(images, 1), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -np.inf)
    counted = confident.argmax(axis=1)
    is_counted = np.isfinite(confident[rows, counted])
    off = np.bincount(target[is_counted & (counted != target)], minlength=classes)
    total = np.bincount(target[is_counted], minlength=classes)
    estimated = float((off / np.maximum(total, 1) * images).sum())
    return np.where(is_counted, counted, target), estimated


def find_in_records(records: Records, num_classes: int) -> LabelErrors:
    """Judge the labels of evaluated images, on which the model was not trained.

    Records hold the probabilities of the five best classes, and the loss gives that of the label. Others count as 0.
    """
    probabilities = np.zeros((len(records), num_classes), np.float32)
    np.put_along_axis(probabilities, records.classes, records.probabilities, axis=1)
    probabilities[np.arange(len(records)), records.target] = np.exp(-records.loss)
    return find(records.target, probabilities)


def out_of_fold(features: np.ndarray, target: np.ndarray, folds: int) -> np.ndarray:
    """Probabilities, float64 (n, classes), from logistic regressions that were fitted without the fold of the image.

    `features` is float32 (n, F), `target` int64 (n,) with at least `folds` images of every class 0..max. The folds
    are stratified, and the same in every call.
    """
    from sklearn.linear_model import LogisticRegression  # they take seconds to import, and a run's report needs none
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=REGULARISATION, max_iter=1000)
    parts = StratifiedKFold(folds, shuffle=True, random_state=0)
    pipeline = make_pipeline(StandardScaler(), regression)
    return np.asarray(cross_val_predict(pipeline, features, target, cv=parts, method="predict_proba"))
