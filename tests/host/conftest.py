"""One ComfyUI server for all tests of this folder."""

from collections.abc import Iterator

import pytest

from host import setup
from host.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(setup.locate(), tmp_path_factory.mktemp("server")) as running:
        yield running
