"""Images for the runs that the tests launch."""

from pathlib import Path

import pytest

from tests.conftest import make_folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images or so, in a folder whose name needs quoting."""
    return make_folder(tmp_path_factory.mktemp("images") / "my photos", train=3, val=1)
