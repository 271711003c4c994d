"""Label images in one call. To label more images later, keep a `Predictor`."""

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
    """Label images with an exported model (.onnx, or the Run or run folder that it was exported into).

    `images` is one image or an iterable of them: paths, bytes, binary files, Pillow images, or arrays, uint8 (H, W, 3)
    in RGB or (H, W). `settings` are those of `Predictor.predict`: top_k, batch_size, abstain_below, embed. An image
    that cannot be read gives a Prediction with `error`. Raises ArtifactError if the model is missing, damaged or
    foreign, TypeError for what is no image, ValueError for a number out of range.
    """
    with python_errors():
        try:
            return list(Predictor(model, threads, providers).predict(images, **settings))
        except ModelError as error:
            raise ArtifactError(str(error)) from None
