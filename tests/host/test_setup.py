"""The choice of the host: the packaged ComfyUI, a user's checkout, a user's interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

from host import setup


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "main.py").touch()
    (tmp_path / "requirements.txt").write_text("torch\ntorchsde\ntorchvision\ntorchaudio>=2\n\n#optional:\nav>=14 # video\n")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    return tmp_path


@pytest.mark.parametrize("environment", [{}, {"COMFYUI_PATH": ""}])
def test_the_packaged_comfyui_is_the_default(environment):
    host = setup.locate(environment)
    assert (host.comfy, host.foreign) == (setup.TREE, False)
    assert host.python.parents[1] == setup.ROOT / ".venv"


def test_a_checkout_gets_an_environment_of_its_own(checkout):
    host = setup.locate()
    assert (host.comfy, host.foreign) == (checkout, True)
    assert host.python.parents[1].parent == setup.STATE


def test_torch_and_packages_built_against_it_keep_their_pins(checkout):
    assert setup.checkout_requirements(checkout) == ["torchsde", "av>=14"]


def test_a_given_interpreter_is_used_and_left_alone(checkout, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setattr(setup, "install", lambda *_: pytest.fail("nothing may be installed"))
    assert setup.prepare().python == Path(sys.executable)


def test_a_folder_without_comfyui_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(setup.SetupError, match="holds no main.py"):
        setup.locate()


@pytest.fixture
def fake_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The interpreter of a virtual environment that contains only this file."""
    python = setup.venv_python(tmp_path / "venv")
    monkeypatch.setattr(setup, "make_venv", lambda folder: (python.parent.mkdir(parents=True), python.touch()))
    return python


def test_nothing_is_installed_twice(fake_venv, monkeypatch):
    calls = []
    monkeypatch.setattr(setup, "pip_install", lambda python, step: calls.append(step))
    for _ in range(2):
        setup.install(fake_venv, [["a==1"], ["--no-deps", "b==2"]])
    assert calls == [["a==1"], ["--no-deps", "b==2"]]
    setup.install(fake_venv, [["a==2"]])
    assert calls[2:] == [["a==2"]]


def test_a_failing_pip_is_an_error_and_leaves_no_stamp(fake_venv, monkeypatch):
    monkeypatch.setattr(subprocess, "call", lambda command: 1)
    with pytest.raises(setup.SetupError, match="pip could not install a==1 and 1 more"):
        setup.install(fake_venv, [["a==1", "b==2"]])
    assert not (fake_venv.parents[1] / "installed.txt").exists()
