"""FLUX.1's inventory: which linears are quantized and how, and the order of the blocks."""

import re

from ..layers import layout

# One pattern a kind of layer. Everything else stays in 16 bits: norms, and the layers through which all of the picture or the text
# comes in and goes out.
W4A4 = re.compile(r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]")
SINGLE = re.compile(r"single_blocks\.\d+\.linear[12]")  # [q k v ; MLP up] and [attention out | MLP down]
W4A16 = re.compile(r"double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin|"
                   r"final_layer\.adaLN_modulation\.1|(time|vector|guidance)_in\.out_layer")


def layer_format(name):
    """layout.SVDQUANT, layout.AWQ, or None for a linear that stays in 16 bits.

    name: relative to the diffusion model, e.g. "double_blocks.0.img_attn.qkv".
    """
    if W4A4.fullmatch(name):
        return layout.SVDQUANT
    return layout.AWQ if W4A16.fullmatch(name) else None


def branches(name):
    """How many of the layers that SVDQuant publishes, each with a branch of its own, the W4A4 layer `name` holds."""
    return 2 if SINGLE.fullmatch(name) else 1


def unsigned_from(name, in_features, out_features):
    """The first column of a W4A4 layer's input that comes out of a GELU; in_features if none does.

    The MLP's second layer reads nothing else; a single block's linear2 reads [attention (hidden) ; GELU].
    """
    if name.endswith("_mlp.2"):
        return 0
    return out_features if name.endswith(".linear2") else in_features


def layer_spec(name, weight_shape, rank, bias, dtype):
    """LayerSpec of linear `name`, from its (N, K). Raises ValueError naming the layer where K does not fit."""
    n, k = weight_shape
    try:
        if layer_format(name) == layout.AWQ:
            return layout.LayerSpec(layout.AWQ, k, n, bias=bias, dtype=dtype)
        return layout.svdquant_spec(k, n, rank, unsigned_from(name, k, n), bias, dtype)
    except ValueError as error:
        raise ValueError(f"Layer {name} {error}, so it can't be packed in 4 bits.") from None


def blocks(diffusion_model):
    """[(name, module)] of the transformer blocks, in the order in which they run."""
    return [(f"{kind}.{i}", block) for kind in ("double_blocks", "single_blocks")
            for i, block in enumerate(getattr(diffusion_model, kind))]


def block_layers(block_name, block):
    """{full name: linear} of a block's layers that are to be quantized."""
    named = ((f"{block_name}.{name}", module) for name, module in block.named_modules() if name)
    return {name: module for name, module in named if layer_format(name)}


def outer_layers(diffusion_model):
    """{full name: linear} of the layers outside the blocks that are to be quantized. None of them sees more than a token a picture."""
    return {name: module for name, module in diffusion_model.named_modules() if "_blocks." not in name and layer_format(name)}


def quantized_names(keys):
    """Names of the layers that `keys` (tensor names) hold and that a quantized FLUX packs, in order of appearance."""
    names = (key.removesuffix(".weight") for key in keys if key.endswith(".weight"))
    return [name for name in names if layer_format(name)]


def config(shapes):
    """The FLUX configuration that {tensor name: shape} tell, in ComfyUI's terms; FLUX.1's own where no shape does.

    shapes: of a whole model; packed layers may stand in it for linears.
    """
    hidden, width = shapes["img_in.weight"]
    depths = {key: 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith(f"{kind}.")), default=-1)
              for key, kind in (("depth", "double_blocks"), ("depth_single_blocks", "single_blocks"))}
    return {"image_model": "flux", "in_channels": width // 4, "out_channels": shapes["final_layer.linear.bias"][0] // 4,
            "patch_size": 2, "hidden_size": hidden, "num_heads": hidden // 128, **depths,
            "context_in_dim": shapes["txt_in.weight"][1], "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
            "mlp_ratio": 4.0, "qkv_bias": True, "guidance_embed": "guidance_in.in_layer.weight" in shapes,
            "axes_dim": [16, 56, 56], "theta": 10000}
