"""Models whose low-rank branches are in 8 bits: quantized, saved, loaded, described, converted, and with LoRAs."""

import json

import pytest
import torch
from comfyui_svdquant.cuda import targets
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.quant.checkpoint import inspection, native
from comfyui_svdquant.quant.checkpoint.convert import convert
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.host import fused_blocks, loader, quantize, step_graphs
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.layers.linear import SVDQuantLinear
from comfyui_svdquant.quant.quantizer import presets
from safetensors.torch import load_file, save_file

from ...cuda.launches import expanding
from ..comfy_models import Progress, sample, save, save_expanded, saved_and_loaded
from ..lora_tensors import load_lora
from .test_step_graphs import draws, lora, recorded_graphs

pytestmark = pytest.mark.usefixtures("inference_mode")

LAYER = "single_blocks.0.linear1"


@pytest.fixture(scope="module")
def models(pair_files):
    """{bits of the branches: (quantized model, [LayerRecord])}"""
    with torch.inference_mode():
        recipes = {bits: presets.make_recipe("data-free", 16, branch_bits=bits) for bits in (8, 16)}
        return {bits: quantize.quantize(loader.load_model(pair_files[0]), recipe, None, None, 2, 0, Progress())
                for bits, recipe in recipes.items()}


@pytest.fixture(scope="module")
def file(models, tmp_path_factory):
    with torch.inference_mode():
        return save(models[8][0], tmp_path_factory.mktemp("models") / "int8_branch.safetensors")


def w4a4(model):
    return {name: layer for name, layer in model.packed_layers().items() if isinstance(layer, SVDQuantLinear)}


def test_a_saved_model_loads_to_the_same_bits_and_saves_to_the_same_file(models, file, tmp_path):
    _, loaded = saved_and_loaded(models[8][0], tmp_path / "first.safetensors")
    assert {name: layer.spec for name, layer in loaded.packed_layers().items()} == {
        name: layer.spec for name, layer in models[8][0].packed_layers().items()}
    assert {layer.spec.branch_bits for layer in w4a4(loaded).values()} == {8}
    assert torch.equal(sample(loaded), sample(models[8][0]))
    first, second = load_file(file), load_file(save(loaded, tmp_path / "second.safetensors"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert read_header(file).metadata["svdquant.version"] == "3"


def test_the_branch_takes_half_the_bytes_in_the_file_and_in_memory(models, file, tmp_path):
    wide = {name: layer.spec for name, layer in w4a4(models[16][0]).items()}
    saved = sum((spec.in_features + spec.out_features) * (spec.rank - 2) for spec in wide.values())
    sizes = {bits: sum(p.nbytes for p in model.model.diffusion_model.parameters()) for bits, (model, _) in models.items()}
    assert sizes[16] - sizes[8] == saved
    records = {bits: sum(record.bytes_after for record in found) for bits, (_, found) in models.items()}
    assert records[16] - records[8] == saved
    infos = [inspection.inspect(read_header(path)) for path in (file, save(models[16][0], tmp_path / "16.safetensors"))]
    branches = [info["bytes_by_kind"]["low-rank branches"] for info in infos]
    assert branches[1] - branches[0] == saved and branches[0] < 0.57 * branches[1]
    texts = list(map(inspection.text, infos))
    assert f"low-rank branches: 8 bits in {len(wide)} layers" in texts[0] and "low-rank branches: 8 bits" not in texts[1]


def test_a_file_without_such_branches_is_of_the_version_before(models, tmp_path):
    path = save(models[16][0], tmp_path / "16.safetensors")
    assert read_header(path).metadata["svdquant.version"] == "2"
    assert layout.SVDQUANT_INT8_BRANCH not in str({name: bytes(tensor) for name, tensor in load_file(path).items()
                                                   if name.endswith(layout.QUANT_KEY)})


def test_the_rounding_costs_a_layer_little(models):
    """At most 5 % of its error, 3 % in the mean: of the weight alone, since nothing is calibrated."""
    errors = {bits: {record.name: record.error for record in found if record.rank} for bits, (_, found) in models.items()}
    ratios = [errors[8][name] / error for name, error in errors[16].items()]
    assert max(ratios) < 1.05 and sum(ratios) / len(ratios) < 1.03 and errors[8] != errors[16]


@pytest.fixture(scope="module")
def expanded_file(models, tmp_path_factory):
    """The same model with the expanded branches in 16 bits."""
    return save_expanded(models[8][0], tmp_path_factory.mktemp("models") / "expanded.safetensors")


def test_it_draws_what_the_expanded_model_draws_with_loras_too(file, expanded_file):
    """A LoRA on all layers; and a DoRA, which gives rows a gain."""
    tensors = {}
    for number, (name, layer) in enumerate(w4a4(loader.load_model(file)).items()):
        g, (n, k) = torch.Generator().manual_seed(number), (layer.out_features, layer.in_features)
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, k, generator=g) / 16
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(n, 4, generator=g) / 16
        if name == LAYER:
            tensors[f"diffusion_model.{name}.dora_scale"] = torch.rand(n, 1, generator=g) + 0.5
    drawn = []
    for path in (file, expanded_file):
        model = loader.load_model(path)
        drawn.append([sample(model), sample(load_lora(model, tensors, 0.8)), sample(model)])
    assert all(torch.equal(*each) for each in zip(*drawn))
    assert torch.equal(drawn[0][0], drawn[0][2]) and not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel's stand-in runs on the CPU; test_expand_branch_gpu.py has the kernel")
@pytest.mark.parametrize("fused", [True, False])
def test_a_block_expands_its_branches_by_one_launch(models, file, monkeypatch, fused):
    """Those whose forward is fused; in others each layer expands its own."""
    monkeypatch.setenv(fused_blocks.VARIABLE, str(int(fused)))
    fused_blocks.fused_class.cache_clear()
    model = loader.load_model(file)
    fused_blocks.fused_class.cache_clear()
    expected = sample(models[8][0])

    def no_gpu(device):
        raise KernelsUnavailable("There is the kernel of expand_branch.cu alone.")

    monkeypatch.setattr(targets, "for_device", no_gpu)
    network = model.model.diffusion_model
    blocks = *network.double_blocks, *network.single_blocks
    counts = [sum(isinstance(layer, SVDQuantLinear) for layer in block.modules()) for block in blocks]
    counts = counts if fused else [1] * sum(counts)
    with expanding(monkeypatch) as launches:
        assert torch.equal(sample(model), expected)
    assert launches and launches == counts * (len(launches) // len(counts))


@pytest.mark.gpu
def test_steps_on_a_gpu_draw_what_the_expanded_model_draws(file, expanded_file, monkeypatch):
    """One by one and from a CUDA graph, with a LoRA that comes and goes."""
    monkeypatch.setenv(step_graphs.VARIABLE, "1")
    models = [loader.load_model(path) for path in (file, expanded_file)]
    for strength in (0, 1, 0.5, 0):
        drawn = []
        for model in models:
            draw, patched = draws(model, "cuda"), lora(model, strength) if strength else model
            drawn += [draw(patched) for _ in range(4)]
            assert recorded_graphs(model)
        assert all(torch.equal(each, drawn[0]) for each in drawn)


def damaged(file, path, changes=(), conf=(), version=None):
    """The file with other tensors, another description of LAYER, another version."""
    tensors, header, key = load_file(file), read_header(file), f"{LAYER}.{layout.QUANT_KEY}"
    metadata = {name: value for name, value in header.metadata.items() if name != "svdquant.checksums"}
    if conf:
        tensors[key] = layout.encode_conf(header.description(key) | dict(conf))
    for name, change in dict(changes).items():
        tensors[f"{LAYER}.{name}"] = change(tensors[f"{LAYER}.{name}"])
    save_file(tensors, path, metadata | ({"svdquant.version": version} if version else {}))
    return str(path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_spoil_images_are_refused(file, tmp_path, value):
    changes = {"weight_proj_scale": lambda scale: scale.index_fill(0, torch.tensor([3]), value)}
    path = damaged(file, tmp_path / "damaged.safetensors", changes)
    for read in (loader.load_model, lambda path: inspection.inspect_body(read_header(path))):
        with pytest.raises(CheckpointError, match="weight_proj_scale has values that are not positive and finite"):
            read(path)


def test_a_model_with_such_scales_is_not_saved(models, tmp_path):
    model = models[8][0]
    scale = model.packed_layers()[LAYER].weight_proj_scale
    before = scale.clone()
    try:
        scale[0] = 0
        with pytest.raises(CheckpointError, match="weight_proj_scale has values that are not positive"):
            save(model, tmp_path / "not.safetensors")
    finally:
        scale.copy_(before)


@pytest.mark.parametrize(("changes", "conf", "version", "sentence"), [
    ({}, {}, "2", "says that it has SVDQuant format version 2, but .* needs version 3"),
    ({"weight_proj_down": lambda codes: codes.bfloat16()}, {}, None, "weight_proj_down is torch.bfloat16 instead of torch.int8"),
    ({"weight_proj_scale": lambda scale: scale.half()}, {}, None, "weight_proj_scale is torch.float16 instead of torch.bfloat16"),
    ({"weight_proj_scale": lambda scale: scale[1:].clone()}, {}, None, r"weight_proj_scale has shape \[2047\] instead of \[2048\]"),
    ({}, {"scale_bits": 4}, None, "says scale_bits = 4, which this version can't run"),
    ({}, {"scale_bits": True}, None, "says scale_bits = True"),
    ({}, {"format": "svdquant_w4a4_int8_scale"}, None, "weight_proj_scale, which a layer of format svdquant_w4a4_int8_scale has no place"),
    ({name: lambda codes: codes[:, :24].contiguous() for name in ("weight_proj_down", "weight_proj_up")},
     {"rank": 24}, None, "branch in 8 bits of rank 24, which is not a positive multiple of 16"),
])
def test_a_file_that_contradicts_itself_is_refused(file, tmp_path, changes, conf, version, sentence):
    path = damaged(file, tmp_path / "damaged.safetensors", changes, conf, version)
    with pytest.raises(CheckpointError, match=sentence):
        loader.load_model(path)


def test_an_older_version_says_to_update(file, monkeypatch):
    monkeypatch.setattr(native, "VERSION", 2)
    with pytest.raises(CheckpointError, match="has SVDQuant format version 3, and this pack reads up to 2; update"):
        loader.load_model(file)


def test_nunchakus_layout_gets_the_expanded_branch(models, file, tmp_path):
    path = str(tmp_path / "nunchaku.safetensors")
    convert(file, path, "nunchaku")
    loaded, x = loader.load_model(path), {}
    for name, layer in w4a4(models[8][0]).items():
        other = loaded.packed_layers()[name]
        assert other.spec.branch_bits == 16
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        assert (layer.dense(x.device) - other.dense(x.device)).norm() < 2e-3 * layer.dense(x.device).norm()
    back = str(tmp_path / "back.safetensors")
    convert(path, back, "native")
    assert json.loads(read_header(back).metadata["svdquant.recipe"])["branch_bits"] == 8  # how it was quantized
    assert read_header(back).metadata["svdquant.version"] in ("1", "2")
