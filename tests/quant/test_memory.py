"""Where the tensors lie that a file is read into: in memory for which huge pages were asked, each in a storage by itself."""

import os
import re
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import memory, native, nunchaku, nunchaku_write
from comfyui_svdquant.quant.checkpoint.header import read_header

from .nunchaku_nvfp4 import write_nvfp4
from .packed_flux import packed_flux

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def advised():
    """Where huge pages were asked for: [(first address, behind the last)]."""
    found, smaps = [], Path("/proc/self/smaps").read_text()
    for first, last, flags in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) [^\n]*\n(?:[A-Z]\w+: [^\n]*\n)*?VmFlags: ([^\n]*)", smaps, re.M):
        if "hg" in flags.split():
            found.append((int(first, 16), int(last, 16)))
    return found


def read_nunchaku(path):
    nunchaku_write.save(path, *packed_flux(), {"preset": "data-free"}, "flux")
    return nunchaku.open_file(read_header(path)).tensors()


def read_nvfp4(path):
    write_nvfp4(path)
    return nunchaku.open_file(read_header(path)).tensors()


def read_native(path):
    native.save(path, *packed_flux(), {"preset": "data-free"}, "flux")
    return native.open_file(read_header(path)).tensors()


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the system has no huge pages for those who ask")
@pytest.mark.parametrize("read", [read_nunchaku, read_nvfp4, read_native])
def test_what_is_read_lies_in_huge_pages(tmp_path, monkeypatch, read):
    monkeypatch.setattr(memory, "HUGE", os.sysconf("SC_PAGE_SIZE"))  # for a small model's tensors
    tensors = {name: tensor for name, tensor in read(str(tmp_path / "x.safetensors")) if tensor.nbytes >= memory.HUGE}
    found = advised()
    assert len(tensors) > 20
    assert not [name for name, tensor in tensors.items() if not any(a <= tensor.data_ptr() < b for a, b in found)]


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the system has no huge pages for those who ask")
def test_whole_pages_within_the_tensor():
    tensor = memory.empty((5 << 20,), torch.uint8)
    ends = [last for first, last in advised() if first <= tensor.data_ptr() < last]
    assert ends == [tensor.data_ptr() + (4 << 20)] and tensor.data_ptr() % memory.HUGE == 0


@pytest.mark.parametrize("huge", [1 << 12, 1 << 21])
def test_copies_have_a_storage_each(monkeypatch, huge):
    monkeypatch.setattr(memory, "HUGE", huge)
    tensors = {"scale": torch.randn(3, 1000).bfloat16(), "fp8": torch.randn(5).to(torch.float8_e4m3fn), "none": torch.zeros(7, 0),
               "one": torch.tensor(3.0), "bias": torch.randn(1001)}
    copies = memory.together(tensors)
    for name, copy in copies.items():
        assert copy.dtype == tensors[name].dtype and torch.equal(copy.float(), tensors[name].float())
        assert copy.untyped_storage().nbytes() == copy.nbytes and copy.data_ptr() % memory.ALIGNMENT == 0 and copy.is_contiguous()
        copy.zero_()  # another's is not touched
    kept = memory.together(tensors)["bias"]  # the others are gone
    assert torch.equal(kept, tensors["bias"])


def test_where_the_system_refuses(monkeypatch):
    def refuse(*_args, **_options):
        raise OSError

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    assert memory.empty((3 << 20,), torch.int8).fill_(5).sum() == 5 * (3 << 20)
