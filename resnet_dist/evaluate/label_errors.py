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

from resnet_dist.evaluate.records import Records

# Strong, because a label that is wrong must not be learnt: few images stand against 512 or 2,048 features.
REGULARISATION = 0.01


@dataclass(frozen=True)
class LabelErrors:
    """What speaks against each label, in the order of the images.

    Attributes:
        likely: int64 (n,), the class that speaks most against the label.
        quality: float64 (n,), the normalised margin in 0..1: (p of the label - p of the best other class + 1) / 2.
        suspected: bool (n,), whether the image is off the diagonal of the confident joint.
        order: int64 (n,), positions from the most to the least likely error: the suspected ones first, each by quality.
    """

    likely: np.ndarray
    quality: np.ndarray
    suspected: np.ndarray
    order: np.ndarray


def find(target: np.ndarray, probabilities: np.ndarray) -> LabelErrors:
    """Judge labels, int64 (n,), by probabilities, float (n, classes) in 0..1, which did not learn from them.

    An image counts for the confident joint as the most probable of those classes whose probability reaches that
    class's threshold, the mean probability of the class over the images that bear its label.
    """
    rows = np.arange(len(target))
    own = probabilities[rows, target]
    others = probabilities.astype(np.float64)
    others[rows, target] = -np.inf
    best_other = others.argmax(axis=1)
    images = np.bincount(target, minlength=probabilities.shape[1])
    sums = np.bincount(target, weights=own, minlength=probabilities.shape[1])
    thresholds = np.where(images > 0, sums / np.maximum(images, 1), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -np.inf)
    counted = confident.argmax(axis=1)
    suspected = np.isfinite(confident[rows, counted]) & (counted != target)
    quality = (own - others[rows, best_other] + 1) / 2
    return LabelErrors(
        likely=np.where(suspected, counted, best_other),
        quality=quality,
        suspected=suspected,
        order=np.lexsort((quality, ~suspected)),
    )


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
