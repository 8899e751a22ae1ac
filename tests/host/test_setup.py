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


@pytest.mark.parametrize(("tests", "gpu", "left_out"), [(True, False, set()), (False, True, {"kitchen", "tests"}),
                                                         (False, False, {"kitchen", "tests", "kernels"})])
def test_the_demo_installs_less_than_the_tests(monkeypatch, tests, gpu, left_out):
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: gpu)
    host = setup.locate({})
    names = list(setup.steps(host, tests))
    assert names[0] == "torch" and set(setup.steps(host, True)) - set(names) == left_out


def test_every_file_of_pins_is_installed(checkout):
    packaged, foreign = setup.steps(setup.locate({}), True), setup.steps(setup.locate(), True)
    installed = [package for step in (packaged | foreign).values() for package in step]
    assert [line for path in setup.PINS.glob("*.txt") for line in setup.pip_pins(path.stem) if line not in installed] == []


@pytest.fixture
def fake_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> setup.Host:
    """A host whose virtual environment contains only an interpreter and its configuration. It is made where there is none, or one of
    another Python."""
    python = setup.venv_python(tmp_path / "venv")

    def make(folder):
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        (folder / "steps.json").unlink(missing_ok=True)
        (folder / "pyvenv.cfg").write_text("home = /usr\nversion = {}.{}.9\n".format(*sys.version_info))

    monkeypatch.setattr(setup, "make_venv", make)
    return setup.Host(python, tmp_path / "ComfyUI", foreign=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The steps that pip has installed, and "compiled" after those of a run."""
    found = []
    monkeypatch.setattr(setup, "pip_install", lambda python, step: found.append(step))
    monkeypatch.setattr(setup, "compile_packages", lambda host: found.append("compiled"))
    return found


def test_nothing_is_installed_twice(fake_venv, calls):
    for _ in range(2):
        setup.install(fake_venv, {"a": ["a==1"], "b": ["--no-deps", "b==2"]})
    assert calls == [["a==1"], ["--no-deps", "b==2"], "compiled"]
    setup.install(fake_venv, {"a": ["a==2"]})
    setup.install(fake_venv, {"a": ["a==1"], "c": ["c==3"]})
    assert calls[3:] == [["a==2"], "compiled", ["a==1"], ["c==3"], "compiled"]


@pytest.mark.parametrize("foreign", [False, True])
def test_all_packages_are_compiled_where_the_hosts_processes_look(foreign, tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "good.py").write_text("a = 1")
    (packages / "python2.py").write_text("print 1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)  # which a test run on somebody's own ComfyUI has
    monkeypatch.setattr(setup, "STATE", tmp_path / "state")
    monkeypatch.setattr(setup, "site_packages", lambda python: packages)
    host = setup.Host(Path(sys.executable), tmp_path / "ComfyUI", foreign)
    setup.compile_packages(host)
    print_cache = "import importlib.util, sys; print(importlib.util.cache_from_source(sys.argv[1]))"
    command = [str(host.python), "-c", print_cache, str(packages / "good.py")]
    expected = Path(subprocess.check_output(command, text=True, env=setup.variables(host)).strip())
    assert list(tmp_path.rglob("*.pyc")) == [expected]
    assert expected.is_relative_to(tmp_path / "state") == foreign


def test_an_environment_of_another_python_is_made_again(fake_venv, calls):
    setup.install(fake_venv, {"a": ["a==1"]})
    (fake_venv.python.parents[1] / "pyvenv.cfg").write_text("version = 3.9.1\n")
    setup.install(fake_venv, {"a": ["a==1"]})
    assert calls == [["a==1"], "compiled", ["a==1"], "compiled"]


def test_a_failing_pip_is_an_error_and_the_next_run_goes_on(fake_venv, monkeypatch):
    tried = []
    monkeypatch.setattr(subprocess, "call", lambda command: tried.append(command[-1]) or command[-1] == "b==2")
    for _ in range(2):
        with pytest.raises(setup.SetupError, match="pip could not install a==1 and 1 more"):
            setup.install(fake_venv, {"first": ["c==3"], "second": ["a==1", "b==2"]})
    assert tried == ["c==3", "b==2", "b==2"]
