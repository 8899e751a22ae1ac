"""SVDQuant Several GPUs as ComfyUI calls it; tests/quant/host/test_several_gpus.py has what its MODEL does."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from comfyui_svdquant.nodes import several_gpus as node
from comfyui_svdquant.quant.host import loader, model_folder, several_gpus
from comfyui_svdquant.quant.parallel import crew

from host.server import ROOT, TINY

PATH = str(ROOT / "demo" / "tiny_flux" / TINY["diffusion_models"])


def test_nothing_is_imported_before_the_node_runs():
    """torch.distributed and the worker's code come with host/several_gpus.py."""
    statements = ast.parse(Path(node.__file__).read_text(encoding="utf-8")).body
    modules = [statement.module or "" for statement in statements if isinstance(statement, ast.ImportFrom)]
    assert modules and not any("several_gpus" in module or "parallel" in module for module in modules)


def test_the_node_starts_one_process_for_each_further_gpu(monkeypatch):
    started = []
    monkeypatch.setattr(model_folder, "find", lambda name: PATH)
    monkeypatch.setattr(several_gpus.crew, "Crew", lambda size, command, device: started.append((size, command)) or SimpleNamespace())
    model = loader.load_model(PATH, name="tiny.safetensors")
    [drawn] = node.SVDQuantSeveralGPUs.execute(model, 2).result
    [(size, command)] = started
    assert size == 2 and PATH in command[-1] and drawn is not model and drawn.model is model.model
    assert not model.wrappers and several_gpus.KEY in drawn.wrappers[several_gpus.WRAPPER]


def test_more_gpus_than_there_are_is_a_sentence(monkeypatch):
    monkeypatch.setattr(crew.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="has 1 GPU, and the input gpus is 2; choose at most 1"):
        crew._environments(2, crew.torch.device("cuda", 0))


def test_every_worker_sees_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(crew.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in crew._environments(4, crew.torch.device("cuda", 2))] == ["0", "1", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7,9")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in crew._environments(3, crew.torch.device("cuda", 0))] == ["6", "7"]
