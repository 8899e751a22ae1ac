"""The machine that the demo's table names."""

import os
import platform

import torch

import show


def test_the_table_names_its_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = show.machine()
    assert found["device"].startswith(f"{os.cpu_count()} cores of ") and len(found["device"]) > len("2 cores of ")
    assert (found["torch"], found["python"]) == (torch.__version__, platform.python_version())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    assert show.machine()["device"] == "NVIDIA X"


def test_a_system_that_does_not_name_its_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(show, "Path", lambda _: tmp_path / "missing")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert show.cpu() == "riscv64"
