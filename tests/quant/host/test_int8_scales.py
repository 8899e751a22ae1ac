"""Files with int8 scales in ComfyUI: the same model, with computed scales while all other tensors stay mapped."""

import os
import sys

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import loader
from safetensors.torch import load_file, save_file

from ..comfy_models import sample, save

pytestmark = pytest.mark.usefixtures("inference_mode")


def mappings(path):
    """[(first address, end)] of this process's mappings of a file."""
    with open("/proc/self/maps") as lines:
        ranges = [line.split(maxsplit=5)[0].split("-") for line in lines if line.rstrip("\n").endswith(str(path))]
    return [(int(first, 16), int(end, 16)) for first, end in ranges]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's list of mapped files")
def test_only_the_scales_are_in_separate_memory(pair_files):
    quantized_model = loader.load_model(pair_files[1])
    packed = native.open_file(read_header(pair_files[1]))
    assert packed.computed == {f"{name}.weight_scale" for name, layer in quantized_model.packed_layers().items() if layer.spec.rank}
    state, ranges = quantized_model.model.diffusion_model.state_dict(), mappings(pair_files[1])
    own = {name for name, tensor in state.items() if not any(first <= tensor.data_ptr() < end for first, end in ranges)}
    assert own == packed.computed
    assert all(state[name].untyped_storage().nbytes() == state[name].nbytes for name in own)


def test_a_loaded_model_draws_and_saves_the_same(pair_files, tmp_path):
    quantized_model = loader.load_model(pair_files[1])
    again = save(quantized_model, tmp_path / "again.safetensors")
    first, second = load_file(pair_files[1]), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    packed = native.open_file(read_header(again))
    infos = {name: (shape, packed.dtypes[name]) for name, shape in packed.shapes.items()}
    native.save_stream(str(tmp_path / "before.safetensors"), infos, packed.tensors(), packed.specs, packed.config, packed.recipe,
                       packed.source)
    before = loader.load_model(str(tmp_path / "before.safetensors"))
    assert read_header(str(tmp_path / "before.safetensors")).metadata["svdquant.version"] == "3"  # its branches have 8 bits
    assert torch.equal(sample(before), sample(quantized_model))


def test_invalid_scales_are_refused_in_one_sentence(pair_files, tmp_path):
    tensors = load_file(pair_files[1])
    tensors["single_blocks.0.linear2.weight_scale"][0, 0] = -16
    save_file(tensors, tmp_path / "bad.safetensors", metadata=read_header(pair_files[1]).metadata)
    with pytest.raises(CheckpointError, match=r"^bad.safetensors: tensor single_blocks.0.linear2.weight_scale has values outside"):
        loader.load_model(str(tmp_path / "bad.safetensors"))
    assert os.listdir(tmp_path) == ["bad.safetensors"]
