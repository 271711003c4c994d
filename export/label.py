"""Predict the classes of images in one call. To predict more images later, keep a `Predictor`."""

import os
from collections.abc import Iterable
from typing import Any

from export.predict import ModelError, Prediction, Predictor, Source
from resnet_dist.errors import ArtifactError, python_errors


def predict(
    model: str | os.PathLike[str],
    images: Source | Iterable[Source],
    *,
    threads: int | None = None,
    providers: str = "auto",
    **settings: Any,
) -> list[Prediction]:
    """Predict the classes of images with an exported model.

    `model` is a .onnx file, a Bundle, or the Run or run folder that was exported. `images` is one image or an iterable
    of images: paths, bytes, binary files, Pillow images, or uint8 arrays (H, W, 3) in RGB or (H, W). `settings` are
    the keywords of `Predictor.predict`: top_k, batch_size, abstain_below, embed. An image that cannot be read gives a
    Prediction with `error`. Raises ArtifactError if the model is missing, damaged or not from resnet-dist, TypeError
    if an item is not an image, ValueError if a number is out of range.
    """
    with python_errors():
        try:
            return list(Predictor(model, threads, providers).predict(images, **settings))
        except ModelError as error:
            raise ArtifactError(str(error)) from None
