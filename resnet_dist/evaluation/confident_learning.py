"""Which labels are probably wrong, from probabilities that an image's own label had no part in.

Confident learning (Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR
2021). For validation images the trained model's probabilities will do; for training images they come out of fold.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from resnet_dist.evaluation.intervals import lower_bound
from resnet_dist.evaluation.records import Records

# Strong, because a wrong label must not be learned: there are few images and 512 or 2,048 features.
REGULARISATION = 0.01
# How far a judge must be on the way from always naming the largest class (0) to always being right (1). Simulated with
# 2 and 10 classes, 300 and 500 images: with 5 % wrong labels, 13 of 100 suspects of a judge at 0.45 are wrong labels,
# and 60 of 100 at 0.7 to 0.75. With no wrong label, a judge at 0.5 suspects a fifth of the images, at 0.8 one in 70.
LEAST_SKILL = 0.6
CONFIDENCE = 0.95
OUT_OF_FOLD = "classifiers that were fitted without the image"


@dataclass(frozen=True)
class Judge:
    """How well the labels can be predicted, and whether that is enough to judge them.

    Attributes:
        right: how many of the `images` labels it predicts.
        chance: the share of the largest class, 0..1, which is what always naming that class would predict.
    """

    right: int
    images: int
    chance: float

    @classmethod
    def of(cls, right: np.ndarray, target: np.ndarray) -> "Judge":
        """From bool (n,), which labels are predicted, and int64 (n,), the labels."""
        return cls(int(right.sum()), len(target), float(np.bincount(target).max()) / len(target))

    @property
    def low(self) -> float:
        """The lower bound of the share that it predicts."""
        return lower_bound(self.right, self.images, CONFIDENCE)

    @property
    def needed(self) -> float:
        """What the lower bound must reach."""
        return self.chance + LEAST_SKILL * (1 - self.chance)

    @property
    def can_tell(self) -> bool:
        """Whether its suspicions are to be believed more often than not."""
        return self.low >= self.needed

    def sentence(self, suspected: int, name: str) -> str:
        """The result in words. `name` says who judges the labels: "the network"."""
        predicted = f"{self.right:,} of {self.images:,} labels ({self.right / self.images:.2f})"
        if self.can_tell:
            return f"{suspected:,} labels are suspected. {predicted} are predicted correctly by {name}."
        return (
            f"It cannot be told which labels are wrong: only {predicted} are predicted correctly by {name}. With "
            f"{100 * CONFIDENCE:g} % confidence that is at least {self.low:.2f}, but {self.needed:.2f} is needed "
            f"(always naming the largest class gives {self.chance:.2f}). More images or better weights may help."
        )


@dataclass(frozen=True)
class LabelErrors:
    """The evidence against each label, in the order of the images.

    Attributes:
        likely: int64 (n,), the class that is most probable instead of the label.
        quality: float64 (n,), the normalised margin in 0..1: (p of the label - p of the best other class + 1) / 2.
        suspected: bool (n,), whether the label is probably wrong; none if the judge cannot tell.
        order: int64 (n,), positions from the most to the least likely error: the suspected ones first, each by quality.
        judge: whether the suspicions can be believed.
    """

    likely: np.ndarray
    quality: np.ndarray
    suspected: np.ndarray
    order: np.ndarray
    judge: Judge


def find(target: np.ndarray, probabilities: np.ndarray) -> LabelErrors:
    """Judge labels, int64 (n,), by probabilities, float (n, classes) in 0..1, which did not learn from them.

    Suspected are the images that the confident joint counts under another class, if that label is not predicted
    either, and of them no more than the joint estimates that there are.
    """
    rows = np.arange(len(target))
    own = probabilities[rows, target]
    others = probabilities.astype(np.float64)
    others[rows, target] = -np.inf
    best_other = others.argmax(axis=1)
    quality = (own - others[rows, best_other] + 1) / 2
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
    """int64 (n,), the class under which the confident joint counts each image, and how many labels it takes for wrong.

    An image counts as the most probable of those classes whose probability reaches that class's threshold, the mean
    probability of the class over the images labelled as it; without such a class, as its label. The estimate scales
    the counts of each label to the number of images labelled as it.
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

    Records hold the five best classes, and the label's own probability through its loss; the others count as 0.
    """
    probabilities = np.zeros((len(records), num_classes), np.float32)
    np.put_along_axis(probabilities, records.classes, records.probabilities, axis=1)
    probabilities[np.arange(len(records)), records.target] = np.exp(-records.loss)
    return find(records.target, probabilities)


def out_of_fold(features: np.ndarray, target: np.ndarray, folds: int) -> np.ndarray:
    """Probabilities, float64 (n, classes), of logistic regressions that were fitted without the image's own fold.

    `features` is float32 (n, F), `target` int64 (n,) with at least `folds` images of every class 0..max. The folds
    are stratified, and the same in every call.
    """
    regression = LogisticRegression(C=REGULARISATION, max_iter=1000)
    parts = StratifiedKFold(folds, shuffle=True, random_state=0)
    pipeline = make_pipeline(StandardScaler(), regression)
    return np.asarray(cross_val_predict(pipeline, features, target, cv=parts, method="predict_proba"))
