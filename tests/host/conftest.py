"""One ComfyUI server for all tests of this folder."""

from collections.abc import Iterator

import pytest

from host import setup
from host.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # A user's folder has spaces and letters of any alphabet in its path.
    with Server(setup.locate(), tmp_path_factory.mktemp("ein ComfyUI ü 模型")) as running:
        yield running
