"""A transform of the user: its random numbers are those of the sample, and what it may return is checked."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from export.predict import Preprocessing
from resnet_dist.config.schema import AugmentConfig, DataConfig
from resnet_dist.data.decode import load_image
from resnet_dist.data.index import ImageTable, read_index
from resnet_dist.data.loader import Share, TrainBatches, TrainImages, TrainLoader, close_loaders
from resnet_dist.data.transforms import Batch
from resnet_dist.errors import DataError
from tests.data.test_loader import assert_equal_batches

SPEC = Preprocessing(img_size=16, resize=18)
CUSTOM = AugmentConfig(aug="custom", crop="random-pad", mixup=0.4)
OF_TORCHVISION = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4)])


def by_all_generators(image: torch.Tensor) -> torch.Tensor:
    """Draws from torch, numpy and Python, and writes into what it is given."""
    image.add_(random.randrange(50)).add_(int(np.random.randint(50)))
    return v2.functional.resize(image, [16, 16]) if torch.rand(()) < 0.5 else image[:, :16, :16]


@pytest.fixture(autouse=True)
def _loaders_end() -> Iterator[None]:
    yield
    close_loaders()


@pytest.fixture(scope="module")
def table(folder: Path) -> ImageTable:
    return read_index(DataConfig(data=str(folder))).train


def batches(table: ImageTable, transform: Callable[[torch.Tensor], torch.Tensor], share: Share) -> TrainLoader:
    images = TrainImages(table, SPEC, CUSTOM, 3, transform)
    return TrainLoader(images, TrainBatches(len(table), 3, share, drop_last=False), 0, pin_memory=False)


@pytest.mark.parametrize("transform", [OF_TORCHVISION, by_all_generators], ids=["torchvision", "function"])
def test_workers_and_processes_and_resuming_change_nothing(
    table: ImageTable, transform: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    share = Share(8)
    here = list(batches(table, transform, share).epoch(1))
    images = TrainImages(table, SPEC, CUSTOM, 3, transform)
    helped = TrainLoader(images, TrainBatches(len(table), 3, share, drop_last=False), 2, pin_memory=False)
    assert_equal_batches(here, list(helped.epoch(1)))
    assert_equal_batches(here[1:], list(batches(table, transform, share).epoch(1, first_step=1)))
    second = [step[0] for step in batches(table, transform, Share(4, world=2, rank=1)).epoch(1)]
    assert all(torch.equal(one[0].images[4:], other.images) for one, other in zip(here, second, strict=True))
    other_epoch = list(batches(table, transform, share).epoch(2))
    assert not torch.equal(here[0][0].images, other_epoch[0][0].images)


def test_custom_transform_gets_the_whole_image_and_nothing_else_is_random(table: ImageTable) -> None:
    seen = []

    def look(image: torch.Tensor) -> torch.Tensor:
        seen.append(image.clone())
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    batch = TrainImages(table, SPEC, CUSTOM, 3, look).__getitems__([(0, 5), (0, 6)])
    assert isinstance(batch, Batch) and batch.flip is None and batch.mix is not None
    assert not batch.images.any()
    assert np.array_equal(seen[0].permute(1, 2, 0).numpy(), load_image(table, 5))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (torch.zeros(3, 16, 16), "not float32 of shape (3, 16, 16)"),
        (torch.zeros(3, 8, 16, dtype=torch.uint8), "not uint8 of shape (3, 8, 16)"),
        (torch.zeros(16, 16, 3, dtype=torch.uint8), "not uint8 of shape (16, 16, 3)"),
        (np.zeros((3, 16, 16), np.uint8), "not a ndarray"),
        (None, "not a NoneType"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_wrong_result_is_one_clear_error(table: ImageTable, result: object, said: str, workers: int) -> None:
    images = TrainImages(table, SPEC, CUSTOM, 3, lambda image: result)  # type: ignore[arg-type, return-value]
    loader = TrainLoader(images, TrainBatches(len(table), 3, Share(8), drop_last=False), workers, pin_memory=False)
    with pytest.raises(DataError) as caught:
        list(loader.epoch(0))
    assert str(caught.value) == f"train_transform must return a uint8 tensor of shape (3, 16, 16), {said}"
