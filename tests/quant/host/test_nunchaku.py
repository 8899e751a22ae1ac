"""Checkpoints in other layouts in a real ComfyUI: Nunchaku's and comfy-kitchen's names against this pack's own file."""

import json

import pytest
import torch
from comfyui_svdquant.quant.checkpoint import checksums, int8_scales, native
from comfyui_svdquant.quant.checkpoint.header import CheckpointError, read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import writer as nunchaku_writer
from comfyui_svdquant.quant.host import build, loader
from comfyui_svdquant.quant.layers import layout
from safetensors.torch import load_file, save_file

from ..comfy_models import sample
from ..packed_flux import packed_flux

RECIPE = {"preset": "data-free"}

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model in this pack's layout and in Nunchaku's."""
    folder, model = tmp_path_factory.mktemp("models"), packed_flux(hidden=256, depth_single=2)
    native.save(str(folder / "native.safetensors"), *model, RECIPE, "flux")
    nunchaku_writer.save(str(folder / "svdq-int4_r16-flux.safetensors"), *model, RECIPE, "flux")
    return folder / "native.safetensors", folder / "svdq-int4_r16-flux.safetensors"


def state(patcher):
    return patcher.model.diffusion_model.state_dict()


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        loader.load_model(str(path))
    assert path.name in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


def edited(source, path, change=lambda tensors: None, metadata=None):
    tensors = load_file(source)
    change(tensors)
    kept = read_header(str(source)).metadata if metadata is None else metadata
    save_file(tensors, path, metadata={key: text for key, text in kept.items() if key != checksums.KEY})
    return path


def test_a_nunchaku_file_holds_the_model_that_was_saved(files):
    ours, theirs = (loader.load_model(str(file)) for file in files)
    assert theirs.recipe == RECIPE and theirs.source == "flux"
    assert {name: layer.spec for name, layer in theirs.packed_layers().items()} == {
        name: layer.spec for name, layer in ours.packed_layers().items()}
    first, second = state(ours), state(theirs)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    # Only the bias of the modulation layers is rounded on the way, where 1 is added to it in 16 bits.
    assert changed and all("mod" in name and name.endswith(".bias") for name in changed)
    for name in changed:
        assert (first[name].float() - second[name].float()).abs().max() <= 2**-8
        second[name].copy_(first[name])
    assert torch.equal(sample(theirs), sample(ours))


def test_a_nunchaku_file_saved_again_is_the_same_to_the_bit(files, tmp_path):
    """Rounding happens once: a file read from Nunchaku's layout, saved in this pack's and in Nunchaku's again, is the same."""
    first = loader.load_model(str(files[1]))
    specs = {name: layer.spec for name, layer in first.packed_layers().items()}
    tensors = {build.stored_name(first.model, name): tensor for name, tensor in state(first).items()}
    config = build.stored_config(first.model)
    native.save(str(tmp_path / "native.safetensors"), tensors, specs, config, RECIPE, "flux")
    y = sample(first)
    assert torch.equal(sample(loader.load_model(str(tmp_path / "native.safetensors"))), y)
    nunchaku_writer.save(str(tmp_path / "again.safetensors"), tensors, specs, config, RECIPE, "flux")
    again, before = load_file(tmp_path / "again.safetensors"), load_file(files[1])
    assert before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("changes", [{}, {"depth": 2, "depth_single": 0}, {"guidance": False}, {"in_channels": 96},
                                     {"hidden": 384, "depth_single": 1}])
def test_the_configuration_comes_from_the_shapes(tmp_path, changes):
    tensors, specs, config = packed_flux(**({"hidden": 256} | changes))
    path = tmp_path / "svdq.safetensors"
    nunchaku_writer.save(str(path), tensors, specs, config, RECIPE, "flux")
    bare = edited(path, tmp_path / "bare.safetensors", metadata={})
    for file in (path, bare):
        patcher = loader.load_model(str(file))
        params = patcher.model.diffusion_model.params
        assert (params.hidden_size, params.num_heads, params.depth, params.depth_single_blocks, params.guidance_embed) == tuple(
            config[key] for key in ("hidden_size", "num_heads", "depth", "depth_single_blocks", "guidance_embed"))
        stored = build.stored_config(patcher.model)
        assert {key: stored[key] for key in config} == config
    if config["in_channels"] == 16:
        assert torch.isfinite(sample(patcher)).all()


def test_metadata_that_does_not_fit_the_tensors(files, tmp_path):
    metadata = read_header(str(files[1])).metadata
    path = tmp_path / "svdq.safetensors"

    def with_config(**entries):
        changed = {key: value for key, value in metadata.items() if key != "comfy_config"}
        config = json.loads(metadata["config"]) | entries
        return refusal(edited(files[1], path, metadata=changed | {"config": json.dumps(config)}))

    assert "depth = 3" in with_config(num_layers=3)
    assert "num_heads = 24" in with_config(num_attention_heads=24)
    assert "axes_dim" in with_config(axes_dims_rope=[16, 56, 57])
    assert "axes_dim" in with_config(axes_dims_rope="wide")
    assert "guidance_embed" in with_config(guidance_embeds=False)


def test_layers_that_do_not_fit_each_other(files, tmp_path):
    """Each layer is complete, but has a width that doesn't fit the model."""
    def widen(tensors):
        part = "transformer_blocks.0.mlp_fc1"
        for leaf in ("qweight", "lora_up", "bias"):
            tensors[f"{part}.{leaf}"] = torch.cat([tensors[f"{part}.{leaf}"]] * 2)
        tensors[f"{part}.wscales"] = torch.cat([tensors[f"{part}.wscales"]] * 2, 1)

    assert "double_blocks.0.img_mlp.0" in refusal(edited(files[1], tmp_path / "wide.safetensors", widen))


def test_foreign_nunchaku_files_are_named(tmp_path):
    path = tmp_path / "svdq-int4_r32-sana.safetensors"
    save_file({"transformer_blocks.0.attn.to_qkv.qweight": torch.zeros(2, 2)}, path)
    assert "a Nunchaku model that is not a FLUX.1, FLUX.2, Qwen-Image or Z-Image" in refusal(path)
    save_file({"img_in.qweight": torch.zeros(2, 2)}, path, metadata={"model_class": "NunchakuSanaTransformer2DModel"})
    assert "is a NunchakuSanaTransformer2DModel" in refusal(path)


# --- comfy-kitchen's names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("terse", [False, True])
def test_files_under_comfy_kitchens_names(files, tmp_path, prefix, terse):
    """This pack's file without its metadata; with `terse`, a layer's description is as short as allowed."""
    def change(tensors):
        for name in list(tensors):
            if terse and name.endswith(f".{layout.QUANT_KEY}"):
                conf = layout.decode_conf(bytes(tensors[name]))
                kept = {key: conf[key] for key in ("format", "act_unsigned", "act_unsigned_from") if key in conf}
                tensors[name] = layout.encode_conf(kept)
            tensors[prefix + name] = tensors.pop(name)

    patcher = loader.load_model(str(edited(files[0], tmp_path / "kitchen.safetensors", change, {})))
    assert torch.equal(sample(patcher), sample(loader.load_model(str(files[0]))))
    assert patcher.source == "kitchen.safetensors" and isinstance(patcher.recipe, dict)


def test_a_linear2_that_is_a_plain_signed_layer_and_blocks_that_are_not_packed(files, tmp_path):
    name, dense = "single_blocks.0.linear2", "double_blocks.0.img_attn.proj"

    def change(tensors):
        conf = layout.decode_conf(bytes(tensors[f"{name}.comfy_quant"]))
        del conf["act_unsigned_from"]
        tensors[f"{name}.comfy_quant"] = layout.encode_conf(conf | {"format": layout.SVDQUANT})
        # Such a layer's scales are not stored as integers.
        tensors[f"{name}.weight_scale"] = int8_scales.product(tensors[f"{name}.weight_scale"], tensors.pop(f"{name}.weight_scale_2"))
        for part in [part for part in tensors if part.startswith(f"{dense}.") and not part.endswith(".bias")]:
            del tensors[part]
        tensors[f"{dense}.weight"] = torch.randn(256, 256, dtype=torch.bfloat16) / 16

    patcher = loader.load_model(str(edited(files[0], tmp_path / "kitchen.safetensors", change, {})))
    layers = patcher.packed_layers()
    assert layers[name].spec.unsigned_from == 5 * 256 and dense not in layers
    assert torch.isfinite(sample(patcher)).all()
