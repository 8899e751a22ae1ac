"""Faults in the middle of work end in one sentence, and leave nothing behind."""

from types import SimpleNamespace

import pytest
from comfyui_svdquant.quant.host import quantize_blocks
from comfyui_svdquant.quant.quantizer import calibration


@pytest.mark.parametrize(("error", "tries"), [
    (MemoryError(), 1), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1), (RuntimeError("CUDA error: out of memory"), 3)])
def test_a_layer_without_memory_is_named(monkeypatch, error, tries):
    """A full device gets another try and the CPU; full host memory does not."""
    calls = []

    def weight(_patcher, name, device):
        calls.append(device)
        raise error

    monkeypatch.setattr(quantize_blocks, "effective_weight", weight)
    patcher, memory = SimpleNamespace(load_device="cpu"), calibration.Memory("cpu")
    with pytest.raises(MemoryError) as caught:
        quantize_blocks.quantize_layer(patcher, "double_blocks.0.img_mod.lin", None, None, None, memory, None)
    assert str(caught.value).startswith("There is not enough memory to quantize double_blocks.0.img_mod.lin (")
    assert "with the input exceptions." in str(caught.value) and len(calls) == tries
