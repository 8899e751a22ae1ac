"""Files that are cut off, written to, replaced or deleted while they are loaded, and while a loaded model has its weights in them."""

import os
import time

import comfy.model_management
import comfy.utils
import pytest
import torch
from comfyui_svdquant.quant.checkpoint import header, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import build, loader, mapping, saving
from safetensors import SafetensorError

from ..packed_flux import packed_flux

pytestmark = pytest.mark.usefixtures("inference_mode")
TENSOR = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flux.safetensors"
    native.save(str(path), *packed_flux(), {"preset": "data-free"}, "flux")
    return path.read_bytes()


@pytest.fixture
def path(original, tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(original)
    os.utime(path, ns=(0, 10**18))  # so that the next write gives another time, whatever the file system's clock
    return path


def cut(path):
    os.truncate(path, 100_000)


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\1" * 1000)


def replace(path):
    other = path.with_name("other")
    other.write_bytes(b"other")
    os.replace(other, path)


def weight(patcher):
    return patcher.model.diffusion_model.get_submodule(TENSOR.removesuffix(".weight")).weight


@pytest.mark.parametrize("change", [cut, overwrite])
@pytest.mark.parametrize("use", [lambda patcher: comfy.model_management.load_models_gpu([patcher]),
                                 lambda patcher: saving.save_model(patcher, "never_written", "native"),
                                 lambda patcher: build.copied(patcher.model, {})], ids=["draw", "save", "copy"])
def test_a_file_that_is_written_to_is_not_used(path, change, use):
    """To read a page past the end of a mapped file ends the process."""
    patcher = loader.load_model(str(path))
    change(path)
    with pytest.raises(CheckpointError, match="flux.safetensors was written to after it was loaded, and this MODEL .* run SVDQuant Load"):
        use(patcher)


@pytest.mark.parametrize("change", [replace, os.remove])
@pytest.mark.skipif(os.name == "nt", reason="Windows refuses to delete and to replace mapped files")
def test_a_file_that_is_replaced_or_deleted_stays_as_it_was(path, change):
    patcher = loader.load_model(str(path))
    before = weight(patcher).clone()
    change(path)
    comfy.model_management.load_models_gpu([patcher])
    assert torch.equal(weight(patcher).cpu(), before)


def test_weights_that_have_left_the_file_are_used(path):
    """As on a GPU: a later load finds copies in memory."""
    patcher = loader.load_model(str(path))
    for parameter in patcher.model.diffusion_model.parameters():
        parameter.data = parameter.data.clone()
    cut(path)
    mapping.check(patcher.model)
    assert not patcher.model.svdquant_mapping.addresses
    mapping.check(patcher.model)


def test_comfyuis_option_copies_the_weights(path, monkeypatch):
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    patcher = loader.load_model(str(path))
    before = weight(patcher).clone()
    cut(path)
    comfy.model_management.load_models_gpu([patcher])
    assert torch.equal(weight(patcher).cpu(), before)


def test_the_check_takes_microseconds(path):
    patcher = loader.load_model(str(path))
    before = time.perf_counter()
    for _ in range(100):
        mapping.check(patcher.model)
    assert (time.perf_counter() - before) / 100 < 1e-3  # 3 us, one os.stat, on a virtual machine of 2.6 GHz


POINTS = {"before the int8 scales are read": (loader, "set_act_bits"), "before it is mapped": (comfy.utils, "load_torch_file")}


@pytest.mark.parametrize("change", [cut, overwrite, replace, os.remove])
@pytest.mark.parametrize("point", POINTS)
def test_a_file_that_changes_between_header_and_mapping_is_named(path, monkeypatch, change, point):
    owner, name = POINTS[point]
    function = getattr(owner, name)

    def changed(*args, **kwargs):
        change(path)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(CheckpointError, match="flux.safetensors was changed, cut off or removed while it was read; wait until"):
        loader.load_model(str(path))


@pytest.mark.parametrize("error", [SafetensorError("InvalidHeaderDeserialization"), OSError(5, "Input/output error"),
                                   PermissionError(13, "Permission denied")])
def test_a_reader_that_fails_is_named(path, monkeypatch, error):
    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(comfy.utils, "load_torch_file", fails)
    with pytest.raises(CheckpointError, match=r"flux.safetensors (is not read by the safetensors library|can't be read) \("):
        loader.load_model(str(path))


def test_a_path_that_can_not_be_read_is_named(tmp_path):
    for path in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=rf"{path.name} can't be read \(.*\); check that it is there"):
            read_header(str(path))


# --- headers that cost ---------------------------------------------------------------------------------------------


def head(raw):
    return len(raw).to_bytes(8, "little") + raw


def refusal(path, raw):
    path.write_bytes(head(raw))
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    message = str(caught.value)
    assert path.name in message and message.endswith(".") and len(message) < 1000 and message.isprintable()
    return message


def test_a_header_that_is_too_large_is_not_parsed(path, monkeypatch):
    monkeypatch.setattr(header.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    assert "has a header of 17 MB, where models have less than 1 MB" in refusal(path, b"{" + b" " * 17_000_000 + b"}")
    entry = b',"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    assert "has more than 100000 tensors" in refusal(path, b"{" + entry[1:] + entry * 100_000 + b"}")


@pytest.mark.parametrize("name", ["x" * 100_000, "\\n" * 100_000, "single_blocks.0." + "y" * 100_000 + ".comfy_quant"],
                         ids=["long", "lines", "layer"])
def test_names_of_any_length_give_short_messages(path, original, name):
    entry = f'{{"{name}":{{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}}}'
    assert "damaged" in refusal(path, entry.encode())
    size = int.from_bytes(original[:8], "little")
    raw = original[8:8 + size].replace(f'"{TENSOR}"'.encode(), f'"{name}"'.encode())
    path.write_bytes(head(raw) + original[8 + size:])
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    assert len(str(caught.value)) < 1000 and str(caught.value).startswith("flux.safetensors")
