"""Freed memory that glibc would keep is returned to the system."""

import platform
import subprocess
import sys

import pytest
from comfyui_svdquant.quant.host import heap

# Holes of 100 KB between pieces of the same size that stay. Smaller pieces would fit into older holes, and glibc returns the heap's end
# by itself.
CODE = """
import re, runpy, sys, torch
give_back = runpy.run_path(sys.argv[1])["give_back"]
def resident():
    return int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])
pieces = [torch.ones(100_000, dtype=torch.uint8) for _ in range(1200)]
kept = pieces[::2]
del pieces
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of another C library")
def test_holes_go_back_to_the_system():
    kilobytes = int(subprocess.check_output([sys.executable, "-c", CODE, heap.__file__], text=True))
    assert kilobytes > 40_000, f"{kilobytes} KB of 60,000"


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert heap._malloc_trim.__wrapped__() is None
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.give_back()
