"""Nunchaku's Qwen-Image and Z-Image files in a real ComfyUI draw what an independent decoder of the same file draws."""

import json
from functools import partial

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import convert, inspection
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.families.family import Packing
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file

from .. import nunchaku_files as files
from ..family_cases import QWEN_IMAGE, Z_IMAGE

CASES = {files.QWEN: QWEN_IMAGE, files.Z_IMAGE: Z_IMAGE}
FORMS = [(files.QWEN, {}), (files.QWEN, {"nvfp4": True}), (files.Z_IMAGE, {}), (files.Z_IMAGE, {"nvfp4": True}),
         (files.Z_IMAGE, {"skip_refiners": True})]

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0][8:13]}-{'-'.join(form[1])}")
def model(request, tmp_path_factory):
    """(kind, its options, path of the Nunchaku file, its tensors, path of the 16-bit file that it was made of)."""
    kind, options = request.param
    folder = tmp_path_factory.mktemp("nunchaku")
    tensors, metadata, plain = files.encoded_model(kind, **options)
    save_file(tensors, folder / "svdq.safetensors", metadata)
    save_file(plain, folder / "plain.safetensors")
    return kind, options, folder / "svdq.safetensors", tensors, folder / "plain.safetensors"


def with_decoded_layers(plain, kind, tensors, nvfp4):
    """The 16-bit model at the path `plain`, whose linears compute what Nunchaku's decodeds do with the file's tensors."""
    patcher = loader.load_model(str(plain))
    layers, modulations, _ = files.LAYERS[kind]()

    def compute(name, function):
        patcher.model.diffusion_model.get_submodule(name).forward = function

    for part, ours in layers.items():
        if f"{part}.qweight" in tensors:
            decoded = files.Decoded(tensors, part, nvfp4)
            for i, name in enumerate(ours):
                compute(name, partial(rows, decoded, i, len(ours)))
    for name in modulations:
        compute(name, partial(dense, *files.decoded_modulation(tensors, name)))
    return patcher


def rows(decoded, i, count, x):
    return decoded(x).chunk(count, -1)[i]


def dense(weight, bias, x):
    return (x.float() @ weight.t() + bias).to(x.dtype)


def test_a_file_draws_what_an_independent_decoder_draws(on_cpu, model):
    """INT4 layers round their inputs to eight bits here, so that the files' four bits are by far the most of the picture's error."""
    kind, options, path, tensors, plain = model
    case, nvfp4 = CASES[kind], options.get("nvfp4", False)
    ours = case.sample(loader.load_model(str(path), act_bits=8))
    theirs = case.sample(with_decoded_layers(plain, kind, tensors, nvfp4))
    exact = case.sample(loader.load_model(str(plain)))
    assert relative_error(ours, theirs) < 0.2 * relative_error(ours, exact)


def test_every_layer_has_the_weights_of_its_rows(model):
    """q, k and v of Qwen-Image, and w3 and w1 of Z-Image, are rows of one layer of the file. A layer with its neighbour's rows would have
    an error of more than 1."""
    kind, options, path, tensors, _ = model
    case, packed, seen = CASES[kind], loader.load_model(str(path), act_bits=8).packed_layers(), set()
    g = torch.Generator().manual_seed(3)
    for part, ours in files.LAYERS[kind]()[0].items():
        if f"{part}.qweight" in tensors:
            decoded = files.Decoded(tensors, part, options.get("nvfp4", False))
            x = torch.randn(5, len(decoded.smooth), generator=g)
            x = torch.nn.functional.gelu(x, approximate="tanh") if files.is_after_gelu(part) else x
            for name, expected in zip(ours, decoded(x).chunk(len(ours), -1)):
                packed[name].gelu_from = None
                assert relative_error(packed[name](x), expected) < 0.03, name
                seen.add(name)
    assert seen == {name for name in packed if case.family.layer(name).packing is Packing.W4A4}


def test_inspect_and_convert_read_it(model, tmp_path):
    kind, options, path, _, _ = model
    case, ours = CASES[kind], tmp_path / "ours.safetensors"
    text = inspection.text(inspection.inspect(read_header(str(path))))
    assert f"Nunchaku layout, {'NVFP4' if options.get('nvfp4') else 'INT4'}" in text and case.family.title in text
    convert.convert(str(path), str(ours), "native")
    first, second = (loader.load_model(str(file)).model.diffusion_model.state_dict() for file in (path, ours))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(CheckpointError, match=f"no place for {case.family.title} models; choose layout native."):
        convert.convert(str(ours), str(tmp_path / "theirs.safetensors"), "nunchaku")


def test_edit_2511_says_in_its_configuration_how_it_reads_reference_images(tmp_path):
    tensors, metadata, _ = files.encoded_model(files.QWEN)
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"zero_cond_t": True})
    save_file(tensors, tmp_path / "svdq.safetensors", metadata)
    info = inspection.inspect(read_header(str(tmp_path / "svdq.safetensors")))
    assert info["model"]["default_ref_method"] == "index_timestep_zero"
    convert.convert(str(tmp_path / "svdq.safetensors"), str(tmp_path / "ours.safetensors"), "native")
    assert "__index_timestep_zero__" in read_header(str(tmp_path / "ours.safetensors")).tensors
