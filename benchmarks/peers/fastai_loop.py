"""fastai's Learner over its own DataLoaders, with those of its transforms that make the same job."""

from collections.abc import Callable
from functools import partial

import peer
from fastai.callback.core import Callback
from fastai.callback.training import BnFreeze
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.augment import CropPad, Flip, RandomResizedCrop, Resize
from fastai.vision.data import ImageDataLoaders


class Tick(Callback):
    """Tells the clock of every training step."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def after_batch(self) -> None:
        """fastai calls this."""
        if self.training:
            self.tick()


def train(job: peer.Job, tick: Callable[[], None]) -> float:
    """Learner.fit; in the head's job the frozen BatchNorm layers keep their statistics, by fastai's own callback."""
    normalize = Normalize.from_stats(peer.MEAN, peer.STD, cuda=peer.DEVICE.type == "cuda")
    whole = [Resize(256), CropPad(job.size)]
    loaders = ImageDataLoaders.from_folder(
        job.data,
        train="train",
        valid="val",
        bs=job.batch_size,
        item_tfms=RandomResizedCrop(job.size, min_scale=0.08) if job.kind == "full" else whole,
        batch_tfms=[Flip(), normalize] if job.kind == "full" else [normalize],
    )
    learner = Learner(
        loaders,
        peer.torchvision_model(job),
        loss_func=CrossEntropyLossFlat(),
        opt_func=partial(SGD, mom=0.9, wd=1e-4),
        metrics=accuracy,
        cbs=[Tick(tick), *([BnFreeze()] if job.kind == "head" else [])],
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(job.epochs, lr=peer.LR[job.kind])
        return float(learner.validate()[1])


if __name__ == "__main__":
    peer.run(train, ["fastai"])
