"""Copying packed tensors in a thread of its own."""

import threading

import pytest
import torch
from comfyui_svdquant.quant.host import allocation_log
from comfyui_svdquant.quant.host.background import Background


def test_values_are_copied_in_order_while_the_caller_goes_on():
    kept, gate = [], threading.Event()

    def then(value):
        assert gate.wait(10) and torch.is_inference_mode_enabled()
        kept.append(value)

    with torch.inference_mode(), Background("cpu", "cpu") as background:
        background.move({"a": ({"x": torch.ones(2)}, ["record"])}, then)
        assert kept == []
        gate.set()
        background.move({"b": ({}, [])}, then)
    (first, (tensors, records)), = kept[0].items()
    assert first == "a" and torch.equal(tensors["x"], torch.ones(2)) and records == ["record"] and list(kept[1]) == ["b"]


def test_the_caller_waits_where_threads_are_forbidden(monkeypatch):
    monkeypatch.setattr(allocation_log, "forbids_threads", lambda: True)
    kept = []
    with Background("cpu", "cpu") as background:
        for value in (1, 2):
            background.move(value, kept.append)
            assert kept[-1] == value


def test_an_error_in_the_thread_reaches_the_caller():
    def fails(value):
        raise MemoryError(value)

    with pytest.raises(MemoryError, match="first"), Background("cpu", "cpu") as background:
        background.move("first", fails)
        background.move("second", fails)
    with pytest.raises(MemoryError, match="last"), Background("cpu", "cpu") as background:
        background.move("last", fails)


def test_what_was_handed_over_is_kept_when_the_run_is_cancelled():
    kept = []
    with pytest.raises(KeyboardInterrupt), Background("cpu", "cpu") as background:
        background.move("block", kept.append)
        raise KeyboardInterrupt
    assert kept == ["block"]


@pytest.mark.gpu
def test_a_copy_has_what_the_gpu_has_yet_to_compute():
    kept, x = [], torch.randn(4096, 4096, device="cuda")
    with Background("cpu", "cuda") as background:
        for _ in range(50):
            x = torch.nn.functional.normalize(x @ x)
        background.move({"x": x}, kept.append)
        later = x @ x
    assert torch.equal(kept[0]["x"], x.cpu()) and kept[0]["x"].device.type == "cpu" and later.isfinite().all()
