"""A model, images and a server, shared by the tests of this folder."""

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.predict import Preprocessing
from tests.conftest import write_image
from tests.export.means import write_means
from tests.export.serve.servers import Server, serving

CLASSES = ["rot", "grün", "蓝"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_means(tmp_path_factory.mktemp("served") / "model.onnx", Preprocessing(img_size=32, resize=32), CLASSES)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six images of three classes."""
    folder = tmp_path_factory.mktemp("photos")
    files = [folder / f"{number}.png" for number in range(6)]
    for number, file in enumerate(files):
        write_image(file, seed=number, tint=number, size=(40, 36))
    return files


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Server]:
    with serving(model, "--max-mib", "0.5", "--max-pixels", "1000000") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[http.client.HTTPConnection]:
    connection = server.connect()
    yield connection
    connection.close()
