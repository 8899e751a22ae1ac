"""The pinned ComfyUI and a newer one start here: every package that their modules import is installed or has a stand-in."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from host import launch, setup
from host.server import PACK, Server

IMPORTS = Path(__file__).with_name("imports_at_start.py")


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> setup.Host:
    """The host of COMFYUI_NEWER_PATH, into whose checkout nothing is written."""
    host = setup.locate({"COMFYUI_PATH": os.environ["COMFYUI_NEWER_PATH"]})
    assert host.python.exists(), f"make its environment first: COMFYUI_PATH={host.comfy} python demo/host/setup.py"
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", setup.variables(host)["PYTHONPYCACHEPREFIX"])
    return host


@pytest.fixture(params=["this", pytest.param("newer", marks=pytest.mark.newer)])
def host(request: pytest.FixtureRequest) -> setup.Host:
    return setup.locate() if request.param == "this" else request.getfixturevalue("newer")


def test_comfyuis_imports_at_start_are_installed(host):
    missing = subprocess.check_output([str(host.python), str(IMPORTS), str(host.comfy)], text=True, env=setup.variables(host))
    assert missing.splitlines() == []


@pytest.mark.newer
@pytest.mark.server
def test_a_newer_comfyui_starts_with_the_pack(newer, tmp_path):
    with Server(newer, tmp_path) as server:
        assert "SVDQuantLoadModel" in server.client.object_info()
        assert PACK in server.client.get("/workflow_templates")
        assert [line for line in server.log().splitlines() if "IMPORT FAILED" in line or "Cannot import" in line] == []


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for a package `absent` that is not installed."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, launch.AbsentPackage("absent")])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "absent"]:
        del sys.modules[name]


def test_an_absent_package_imports_in_any_form(absent):
    import absent
    import absent.deep.er as er
    from absent.deep import Thing, function

    class Ours(Thing):
        pass

    for call, name in ((absent.deep.function, "absent.deep.function"), (er.function, "absent.deep.er.function"),
                       (Ours, "absent.deep.Thing"), (Thing.method, "absent.deep.Thing.method"), (function, "absent.deep.function")):
        with pytest.raises(ImportError, match=f"^{name} can't be called: absent is not installed here"):
            call(1, rate=2)
    assert not hasattr(absent, "__version__") and not isinstance(1, Thing)


def test_only_the_absent_package_has_a_stand_in(absent):
    with pytest.raises(ModuleNotFoundError):
        import absent_too  # noqa: F401
