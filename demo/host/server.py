"""Start a real ComfyUI with the pack in it, in a private base folder, and stop it again."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

from host.client import Client
from host.setup import ROOT, Host

LAUNCH = Path(__file__).with_name("launch.py")
PACK = "ComfyUI-SVDQuant"  # a user's folder name under custom_nodes
DEMO_NODES = "svdquant-demo"
TINY = {"diffusion_models": "tiny_flux.safetensors", "vae": "tiny_vae.safetensors"}
FIRST_VISIT_DONE = '{"Comfy.TutorialCompleted": true}'  # otherwise the page opens the Templates dialog


class ServerError(RuntimeError):
    """ComfyUI did not start."""


class Server:
    """A ComfyUI server as a context manager; `client` talks to it, and `log()` is its output so far.

    base: folder for its models, custom nodes, input, output and user settings; made if missing.
    arguments: further options for main.py.
    """

    def __init__(self, host: Host, base: Path, arguments: tuple[str, ...] = ()):
        self.host = host
        self.base = base
        self.port = free_port()
        self.client = Client(f"http://127.0.0.1:{self.port}")
        self.arguments = arguments
        self.log_path = base / "server.log"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        prepare_base(self.base)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(self.command(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                                            cwd=self.base, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        try:
            self.wait_until_up()
        except BaseException:  # an interrupt while waiting must also end the server
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def command(self) -> list[str]:
        base = str(self.base)
        # The database has its own option, because its default path is in the checkout regardless of the base folder.
        database = "sqlite:///" + (self.base / "user" / "comfyui.db").as_posix()
        return [str(self.host.python), str(LAUNCH), str(self.host.comfy), "--listen", "127.0.0.1", "--port", str(self.port),
                "--base-directory", base, "--database-url", database, "--disable-auto-launch", *device_options(),
                *self.arguments]

    def wait_until_up(self, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended with code {self.process.returncode} while starting:\n{self.tail()}")
            try:
                self.client.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI was not up after {seconds:.0f} s:\n{self.tail()}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log().splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device_options() -> list[str]:
    import torch

    return [] if torch.cuda.is_available() else ["--cpu"]


def prepare_base(base: Path) -> None:
    """Fill a base folder: the tiny model and VAE, the pack and the demo's nodes, and settings that skip the first-visit dialog."""
    for folder in ("custom_nodes", "input", "output", "user/default"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for folder, name in TINY.items():
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / "demo" / "tiny_flux" / name, base / "models" / folder / name)
    link_folder(base / "custom_nodes" / PACK, ROOT)
    link_folder(base / "custom_nodes" / DEMO_NODES, ROOT / "demo" / "custom_node")
    (base / "user" / "default" / "comfy.settings.json").write_text(FIRST_VISIT_DONE, encoding="utf-8")


def link_folder(link: Path, target: Path) -> None:
    """Link `link` to `target`: a symbolic link, or a junction on Windows, where symbolic links need a privilege."""
    if os.path.lexists(link):
        if link.exists() and os.path.samefile(link, target):
            return
        raise ServerError(f"{link} exists and does not lead to {target}. Remove it and try again.")
    if sys.platform == "win32":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, stdout=subprocess.DEVNULL)
    else:
        link.symlink_to(target, target_is_directory=True)
