"""Nunchaku's names of FLUX.1's tensors against ComfyUI's.

Published FLUX.1 files have the names of Nunchaku's first version (v1), which `v1` also makes of the second's (v2, as
newer tools write them). Tables read {ours: theirs}, relative to a block or to the model.
"""

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
BLOCKS = {"double_blocks": DOUBLE, "single_blocks": SINGLE}

# Two of ours are two of theirs: linear1 by rows (q k v; MLP up), linear2 by columns (attention out | MLP down).
LINEARS = {
    DOUBLE: {
        "img_attn.qkv": ("qkv_proj",), "img_attn.proj": ("out_proj",), "img_mlp.0": ("mlp_fc1",),
        "img_mlp.2": ("mlp_fc2",), "txt_attn.qkv": ("qkv_proj_context",), "txt_attn.proj": ("out_proj_context",),
        "txt_mlp.0": ("mlp_context_fc1",), "txt_mlp.2": ("mlp_context_fc2",),
    },
    SINGLE: {"linear1": ("qkv_proj", "mlp_fc1"), "linear2": ("out_proj", "mlp_fc2")},
}
MODULATIONS = {
    DOUBLE: {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"},
    SINGLE: {"modulation.lin": "norm.linear"},
}
CHUNKS = {DOUBLE: 6, SINGLE: 3}  # of a modulation layer: shift, scale and gate, twice or once
NORMS = {
    DOUBLE: {
        "img_attn.norm.query_norm.scale": "norm_q.weight", "img_attn.norm.key_norm.scale": "norm_k.weight",
        "txt_attn.norm.query_norm.scale": "norm_added_q.weight", "txt_attn.norm.key_norm.scale": "norm_added_k.weight",
    },
    SINGLE: {"norm.query_norm.scale": "norm_q.weight", "norm.key_norm.scale": "norm_k.weight"},
}
# Outside the blocks; each has a weight and a bias.
OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out",
}
OPTIONAL = ("guidance_in.in_layer", "guidance_in.out_layer")  # schnell has no guidance
# Its halves are scale, shift in diffusers' files and shift, scale in ComfyUI's.
SWAPPED = "final_layer.adaLN_modulation.1"

_V2_MODULES = {
    DOUBLE: {
        "attn.to_qkv": "qkv_proj", "attn.add_qkv_proj": "qkv_proj_context", "attn.to_out.0": "out_proj",
        "attn.to_add_out": "out_proj_context", "ff.net.0.proj": "mlp_fc1", "ff.net.2": "mlp_fc2",
        "ff_context.net.0.proj": "mlp_context_fc1", "ff_context.net.2": "mlp_context_fc2", "attn.norm_q": "norm_q",
        "attn.norm_k": "norm_k", "attn.norm_added_q": "norm_added_q", "attn.norm_added_k": "norm_added_k",
    },
    SINGLE: {"attn.to_qkv": "qkv_proj", "attn.to_out": "out_proj", "attn.norm_q": "norm_q", "attn.norm_k": "norm_k"},
}
_V2_LEAVES = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth",
              "smooth_factor_orig": "smooth_orig"}


def v1(name):
    """The v1 name of a tensor; a v1 name stays."""
    kind, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    if kind not in _V2_MODULES or not rest:
        return name
    module, _, leaf = rest.rpartition(".")
    return f"{kind}.{index}.{_V2_MODULES[kind].get(module, module)}.{_V2_LEAVES.get(leaf, leaf)}"


def depth(names, kind):
    """How many blocks of a kind (DOUBLE or SINGLE) the v1 names show: one more than the highest index."""
    indices = (name.split(".")[1] for name in names if name.startswith(f"{kind}."))
    return 1 + max((int(index) for index in indices if index.isdecimal() and len(index) < 5), default=-1)


def blocks(depths):
    """Yield (our prefix, their prefix, kind) of every block. depths: {DOUBLE: count, SINGLE: count}."""
    for ours, kind in BLOCKS.items():
        for i in range(depths[kind]):
            yield f"{ours}.{i}", f"{kind}.{i}", kind
