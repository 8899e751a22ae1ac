"""Generations without end in one server, while models, LoRAs and sizes change: its memory stays as it is, and a seed keeps its picture."""

import hashlib
import itertools
import os
import random
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from host.client import Client
from host.server import TINY, Server

from ..quant.lora_tensors import generic
from .test_server import base_prompt, pictures, save

SHORT, WHOLE, CYCLES = 12, 500, 20
MODELS, LORAS, PIXELS = ("long_run_native", "long_run_nunchaku", "tiny_flux"), ("style", "words", None), (32, 64, 96)
KINDS = list(itertools.product(MODELS, LORAS, PIXELS))
KEPT = 60  # MB that the allocators of Python, PyTorch and the C library keep for the next use, more or less of it

pytestmark = [pytest.mark.server,
              pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="it reads a process's memory as Linux gives it")]


class State(NamedTuple):
    """What a process holds; private is its own memory in MB, without the files that it maps."""

    private: int
    maps: int
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> "State":
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        maps = Path(f"/proc/{pid}/maps").read_text().count("\n")
        return cls(int(status["RssAnon"].split()[0]) // 1024, maps, int(status["Threads"]), len(os.listdir(f"/proc/{pid}/fd")))

    def grown_since(self, before: "State") -> list[str]:
        """What has grown by more than a run leaves for the next one, as "private: 459 -> 560 (60 more are allowed)"."""
        # A model in memory has some hundred tensors, a mapping each if they are large. Threads and files: those of a request under way.
        allowed = State(KEPT, 99, 2, 5)
        return [f"{name}: {old} -> {new} ({more} more are allowed)" for name, old, new, more in zip(self._fields, before, self, allowed)
                if new - old > more]


def check(what: str, states: list[State], warm: int) -> None:
    """Report the server's states, and assert that it holds no more after the last of them than after the one at `warm`. what: that of which
    each has left a state."""
    shown = [tuple(state) for state in states[warm::max(1, (len(states) - warm) // 25)]]
    report = f"{len(states)} {what}; private MB, mappings, threads, open files from number {warm} on: {shown}, last {tuple(states[-1])}"
    print(report)
    assert states[-1].grown_since(states[warm]) == [], report


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    """Of a server with two LoRAs, and with the small model in 4 bits in both layouts."""
    folder = server.base / "models"
    with safe_open(str(folder / "diffusion_models" / TINY["diffusion_models"]), "pt") as file:
        shapes = {name.removesuffix(".weight"): tuple(file.get_slice(name).get_shape()) for name in file.keys() if name.endswith(".weight")}
    linears = [(name, shape) for name, shape in shapes.items() if len(shape) == 2 and "_blocks." in name]
    (folder / "loras").mkdir(exist_ok=True)
    for name, count, rank in ((LORAS[0], len(linears), 4), (LORAS[1], len(linears) // 2, 24)):
        tensors = {key: tensor.to(torch.bfloat16) for key, tensor in generic(*linears[:count], rank=rank, size=0.05).items()}
        save_file(tensors, str(folder / "loras" / f"{name}.safetensors"))
    prompt = base_prompt()
    for name, layout in zip(MODELS, ("native", "nunchaku")):
        prompt[name] = save("quantized", name, overwrite=True)
        prompt[name]["inputs"]["layout"] = layout
    server.client.post(prompt)
    return server.client


def generate(client: Client, model: str, lora: str | None, pixels: int) -> str:
    """The digest of a picture of one step."""
    prompt = base_prompt()
    del prompt["quantized"]
    prompt["model"]["inputs"]["model_name"] = f"{model}.safetensors"
    prompt["latent"]["inputs"].update(width=pixels, height=pixels)
    prompt["words"]["inputs"]["text"] = "small red circle left of large blue star on white"
    if lora:
        inputs = {"model": ["model", 0], "lora_name": f"{lora}.safetensors", "strength_model": 0.8}
        prompt["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    drawn = pictures("lora" if lora else "model", "picture")
    drawn["picture sampler"]["inputs"]["steps"] = 1
    drawn["picture"] = {"class_type": "PreviewImage", "inputs": {"images": ["picture decoder", 0]}}
    [image] = client.post(prompt | drawn)["picture"]["images"]
    return hashlib.sha256(client.picture(image)).hexdigest()


def run(server: Server, client: Client, kinds: list[tuple], warm: int) -> dict[tuple, str]:
    """{kind: digest of its picture}, the same at each of its turns. warm: generations after which the server holds all that it keeps."""
    drawn, states, begun = {}, [], len(server.log())
    for number, kind in enumerate(kinds):
        digest = generate(client, *kind)
        assert drawn.setdefault(kind, digest) == digest, f"generation {number} draws another picture of {kind} than the first one did"
        states.append(State.of(server.process.pid))
    check("generations", states, warm)
    assert "Traceback" not in server.log()[begun:]
    return drawn


def test_generations(server: Server, client: Client):
    few = [(MODELS[0], None, 32), (MODELS[1], "style", 64), (MODELS[0], "words", 64), (MODELS[2], "style", 32)]
    drawn = run(server, client, few * (SHORT // len(few)), len(few))
    assert len(set(drawn.values())) == len(few)


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_five_hundred_generations(server: Server, client: Client):
    dice = random.Random(0)
    kinds = KINDS + [dice.choice(KINDS) for _ in range(WHOLE - 1 - len(KINDS))] + KINDS[:1]
    drawn = run(server, client, kinds, WHOLE // 4)
    assert len(set(drawn.values())) == len(KINDS)


def free(client: Client) -> None:
    """As ComfyUI-Manager's button that unloads all models; the server does it before its next prompt, or within a second."""
    body = b'{"unload_models": true, "free_memory": true}'
    request = urllib.request.Request(client.url + "/free", body, {"Content-Type": "application/json"}, method="POST")
    urllib.request.urlopen(request, timeout=60).close()


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_twenty_loads_and_unloads(server: Server, client: Client):
    states, drawn = [], set()
    for _ in range(CYCLES):
        drawn.add(generate(client, MODELS[0], LORAS[0], PIXELS[0]))
        free(client)
        states.append(State.of(server.process.pid))
    check("loads and unloads", states, CYCLES // 4)
    assert len(drawn) == 1
