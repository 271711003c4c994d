"""Records of an evaluation against a loop over single images in plain torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

from export.predict import Preprocessing
from resnet_dist.config.schema import DataConfig, SystemConfig
from resnet_dist.data.index import ImageIndex, read_index
from resnet_dist.data.loader import EvalImages, EvalLoader
from resnet_dist.data.transforms import ToInput
from resnet_dist.evaluation.collect import _in_order, collect_records
from resnet_dist.evaluation.records import Records
from resnet_dist.runtime.accelerate import start

SPEC = Preprocessing(img_size=16, resize=18)


@pytest.fixture(scope="module")
def index(folder: Path) -> ImageIndex:
    return read_index(DataConfig(data=str(folder)))


def network(classes: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(classes)).train()


@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_records_equal_a_loop_over_single_images(index: ImageIndex, classes: int, batch_size: int) -> None:
    accelerator, _ = start(SystemConfig(mixed_precision="no", threads=1))
    loader = EvalLoader(EvalImages(index.val, SPEC), batch_size, workers=0, pin_memory=False)
    model = network(classes)
    with torch.no_grad():
        model(torch.zeros(2, 3, 16, 16))
    found = collect_records(accelerator, model, loader, ToInput(SPEC, accelerator.device), classes, full_precision=True)
    to_input = transforms.Compose(
        [
            transforms.Resize(18),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    assert len(found) == len(index.val) and not model.training
    for i, (path, target) in enumerate(zip(index.val.paths, index.val.targets, strict=True)):
        with torch.no_grad():
            logits = model(to_input(Image.open(index.root / path))[None])[0]
        best = logits.softmax(0).topk(min(5, classes))
        assert found.target[i] == target
        assert found.classes[i].tolist() == best.indices.tolist()
        assert found.probabilities[i] == pytest.approx(best.values.numpy(), rel=1e-4)
        assert found.loss[i] == pytest.approx(F.cross_entropy(logits, torch.tensor(target)).item(), rel=1e-4)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_rows_come_in_the_order_of_the_table(order: list[int]) -> None:
    """Gathered rows are sorted, and padding (-1) is dropped."""
    whole = np.array([[i, 10 + i, 20 + i] for i in order] + [[-1, -1, -1]])
    real = np.array([[i / 10, i / 100] for i in order] + [[-1.0, -1.0]], dtype=np.float32)
    found = _in_order(whole, real, 3)
    assert isinstance(found, Records)
    assert found.target.tolist() == [10, 11, 12]
    assert found.loss == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 2]])
def test_missing_and_duplicate_samples_are_an_error(indices: list[int]) -> None:
    whole = np.array([[i, 0, 0] for i in indices])
    with pytest.raises(RuntimeError, match="missing or duplicated"):
        _in_order(whole, np.zeros((len(indices), 2), np.float32), 3)
