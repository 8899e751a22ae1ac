"""SVDQuant Load Model reads a file's header and descriptions once, and does not import the quantizer's pipeline."""

import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from comfyui_svdquant.nodes.load_model import SVDQuantLoadModel
from comfyui_svdquant.nodes.progress import NodeProgress
from comfyui_svdquant.quant.checkpoint import header, native
from comfyui_svdquant.quant.host.attachments import CARD, SOURCE
from comfyui_svdquant.quant.layers import layout
from safetensors.torch import load_file, save_file

from ..quant.packed_flux import packed_flux

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(folder_paths.get_folder_paths("diffusion_models")[-1])

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(params=["native", "comfy-kitchen", "comfy-kitchen, one tensor renamed"])
def file(request):
    """A file of a quantized FLUX.1 in ComfyUI's folder."""
    path = FOLDER / "packed.safetensors"
    native.save(str(path), *packed_flux(), {"preset": "data-free"}, "flux", source_card={"modelspec.author": "somebody"})
    if request.param != "native":
        tensors = load_file(path)
        if "renamed" in request.param:
            tensors["double_blocks.0.img_attn.qkv.proj_up"] = tensors.pop("double_blocks.0.img_attn.qkv.weight_proj_up")
        save_file({f"model.diffusion_model.{name}": t for name, t in tensors.items()}, path, {"modelspec.author": "somebody"})
    yield path
    path.unlink()


class Reads(io.BufferedReader):
    """A file that records which of its bytes are read."""

    noted = []

    def read(self, size=-1):
        self.noted.append((self.tell(), size))
        return super().read(size)


def test_the_header_and_each_description_are_read_once(monkeypatch, file):
    opened, found = [], header.read_header(str(file))

    def noting(path, mode, buffering=-1):
        if buffering == 0:  # weights
            return open(path, mode, buffering)
        opened.append(path)
        return Reads(io.FileIO(path, mode))

    monkeypatch.setattr(header, "open", noting, raising=False)
    monkeypatch.setattr(Reads, "noted", [])
    patcher = SVDQuantLoadModel.execute(file.name, "auto").result[0]
    assert patcher.get_attachment(SOURCE) == file.name and patcher.get_attachment(CARD)["modelspec.author"] == "somebody"
    assert opened == [str(file)] * 2, "once for the header, once for the descriptions"
    times = Counter(Reads.noted)
    assert set(times.values()) == {1} and [start for start, _ in times][:2] == [0, 8]
    descriptions = {(info.start, info.stop - info.start) for name, info in found.tensors.items() if name.endswith(layout.QUANT_KEY)}
    assert len(descriptions) > 10 and set(times) - descriptions == set(list(times)[:2])


def test_the_node_says_what_it_has_loaded(monkeypatch, file):
    said = []
    monkeypatch.setattr(NodeProgress, "say", lambda self, text: said.append(text))
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu"))
    patcher = SVDQuantLoadModel.execute(file.name, "auto").result[0]
    layout_name = "SVDQuant" if "svdquant.version" in header.read_header(str(file)).metadata else "comfy-kitchen"
    assert said == [f"4-bit FLUX.1, {layout_name} layout, INT4, {patcher.model_size() / 1e6:.1f} MB; CPU: PyTorch, slow"]


def test_the_node_does_not_import_the_quantizers_pipeline():
    """Every user loads models, but only some quantize: loading must not import the pipeline, its report and its chart."""
    program = ("import sys, conftest, comfyui_svdquant.nodes.load_model\n"
               "conftest.pytest_unconfigure()\n"
               "print([name for name in sorted(sys.modules) if name.startswith('comfyui_svdquant.quant.quantizer.')])")
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "demo")))
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ("lowrank", "out_of_memory", "truncated_svd")
    assert done.stdout.splitlines()[-1] == str([f"comfyui_svdquant.quant.quantizer.{name}" for name in names]), (
        "LoRA uses their SVDs, and says when memory is full")
