"""The forwards of FLUX's double and single stream blocks, with the elementwise work fused by cuda/block_ops.py. Chroma and FLUX.2 have them
too.

Each function computes what the forward of the host's class computes, whose source was read for every digest in BLOCKS: LayerNorm and
modulation are one pass, RMSNorm, RoPE and the join of text and image are one, a gate and its residual (and the norm after it) are one.
The linears and the modulation layers are called as modules and attention through the host's function, so that LoRAs, hooks and attention
nodes work on them as ever. A function returns NotImplemented for a call that it doesn't take; the host's forward then runs.
"""

from types import MappingProxyType, SimpleNamespace

import torch

from ...cuda import block_ops
from .family import FusedBlock
from .fused_parts import added, added_and_norm, one_vector, output

PRE_ATTENTION = ("attn1_patch", "attn1_output_patch")  # patches that see q and k before RoPE, or expect the host's own order


def double_block(block, host, img, txt, vec, pe, attn_mask=None, modulation_dims_img=None, modulation_dims_txt=None,
                 transformer_options=None):
    """img (B, Li, K), txt (B, Lt, K) -> (img, txt). vec: (B, K), or the modulations themselves; pe: as in block_ops. host:
    fused_blocks.Host."""
    norms = block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2
    if (modulation_dims_img is not None or modulation_dims_txt is not None or getattr(block, "flipped_img_txt", False)
            or not _takes(block, host, norms, (block.img_attn.norm, block.txt_attn.norm), (img, txt), pe, transformer_options)):
        return NotImplemented
    (img_mod1, img_mod2), (txt_mod1, txt_mod2) = (block.img_mod(vec), block.txt_mod(vec)) if modulates(block) else vec
    if not one_vector(img, img_mod1, img_mod2, txt_mod1, txt_mod2):
        return NotImplemented
    eps, tokens = norms[0].eps, txt.shape[1]
    streams = []
    for x, attn, mod in ((txt, block.txt_attn, txt_mod1), (img, block.img_attn, img_mod1)):
        qkv = output(attn.qkv, block_ops.norm_modulate(x, mod.scale, mod.shift, eps))
        streams.append((qkv, *_norm_weights(attn.norm)))
    q, k, v = block_ops.qk_norm_rope(streams, pe, block.num_heads, 3, host.norm_eps(block.img_attn.norm.query_norm, img))
    del streams, qkv
    attn = host.attention(q, k, v, attn_mask, transformer_options or {})
    del q, k, v
    attn = attn.to(img.dtype)
    img, img_in = added_and_norm(block.img_attn.proj, attn[:, tokens:], img, img_mod1, img_mod2, eps)
    txt, txt_in = added_and_norm(block.txt_attn.proj, attn[:, :tokens], txt, txt_mod1, txt_mod2, eps)
    del attn
    img, txt = added(block.img_mlp, img_in, img, img_mod2), added(block.txt_mlp, txt_in, txt, txt_mod2)
    return img, txt


def single_block(block, host, x, vec, pe, attn_mask=None, modulation_dims=None, transformer_options=None):
    """x (B, L, K) -> (B, L, K); the rest as in double_block."""
    if (modulation_dims is not None or getattr(block, "yak_mlp", False)
            or not _takes(block, host, (block.pre_norm,), (block.norm,), (x,), pe, transformer_options)):
        return NotImplemented
    mod = block.modulation(vec)[0] if modulates(block) else vec
    if not one_vector(x, mod):
        return NotImplemented
    joint, hidden = output(block.linear1, block_ops.norm_modulate(x, mod.scale, mod.shift, block.pre_norm.eps)), block.hidden_size
    value, mlp = joint[..., 2 * hidden:3 * hidden], joint[..., 3 * hidden:]
    activated = block.mlp_act(mlp)
    # linear1 has applied the GELU itself; a module in its place may keep its output.
    in_place = activated is mlp and getattr(block.linear1, "gelu_from", None) is not None and not torch.compiler.is_compiling()
    # An attention node may keep v, to use it in another step or block. It gets one that nobody writes to.
    parts = 3 if in_place and not host.keeps_nothing(transformer_options) else 2
    q, k, *v = block_ops.qk_norm_rope([(joint, *_norm_weights(block.norm))], pe, block.num_heads, parts,
                                      host.norm_eps(block.norm.query_norm, x))
    v = v[0] if v else value.unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
    attn = host.attention(q, k, v, attn_mask, transformer_options or {})
    del q, k, v
    if in_place and attn.shape == value.shape:
        # Attention's output takes the place of v, which nobody reads any more: [attention | mlp] then lies in linear1's output as linear2
        # reads it.
        _copy(attn, value)
        joint = joint[..., 2 * hidden:]
    else:
        joint = torch.cat((attn, activated), dim=2).to(x.dtype)
    return added(block.linear2, joint, x, mod)


def modulates(block):
    """Whether a block has modulation layers of its own. ComfyUI's attribute is a bool, a module or None."""
    return block.modulation is not None and block.modulation is not False  # torch.compile can't trace bool(module)


def _copy(source, target):
    """Copy a tensor over another of its shape: 16 bytes at a time, if the source has the dtype and the layout for it."""
    if source.dtype == target.dtype and source.is_contiguous() and source.storage_offset() % 8 == 0:
        source, target = (x.view(torch.complex128) for x in (source, target))
    target.copy_(source)


def _takes(block, host, norms, head_norms, states, pe, transformer_options):
    """Whether the fused passes compute this call: on these tensors, and with nothing of the host's or the user's on what they replace."""
    x, patches = states[0], (transformer_options or {}).get("patches") or {}
    return (host.takes(block, states, pe) and not any(name in patches for name in PRE_ATTENTION)
            and all(host.untouched(norm, "LayerNorm") and norm.weight is None and norm.eps == norms[0].eps for norm in norms)
            and all(host.untouched(norm, "QKNorm") and host.untouched(norm.query_norm, "RMSNorm")
                    and host.untouched(norm.key_norm, "RMSNorm") for norm in head_norms)
            and x.shape[-1] == block.hidden_size and pe.shape[-3] * 2 * block.num_heads == block.hidden_size)


def _norm_weights(norm):
    """The weights (D,) of the RMSNorms of q and of k. ComfyUI has renamed them."""
    return [norm.scale if hasattr(norm, "scale") else norm.weight for norm in (norm.query_norm, norm.key_norm)]


# --- The host's classes -----------------------------------------------------------------------------------------------


def sizes(block):
    """(hidden size, heads, whether the block has modulation layers)"""
    return block.hidden_size, block.num_heads, modulates(block)


def double_example(hidden, heads, modulation, random):
    """(arguments of the class, arguments of a forward) with these sizes() and few tokens. random(*shape): a tensor."""
    text, image = 3, 5
    made = {"hidden_size": hidden, "num_heads": heads, "mlp_ratio": 1.0, "qkv_bias": True, "modulation": modulation}
    vec = random(1, hidden) if modulation else tuple((_example_mod(hidden, random), _example_mod(hidden, random)) for _ in range(2))
    return made, {"img": random(1, image, hidden), "txt": random(1, text, hidden), "vec": vec,
                  "pe": _example_pe(text + image, hidden // heads, random)}


def single_example(hidden, heads, modulation, random):
    """As double_example."""
    tokens = 7
    made = {"hidden_size": hidden, "num_heads": heads, "mlp_ratio": 1.0, "modulation": modulation}
    vec = random(1, hidden) if modulation else _example_mod(hidden, random)
    return made, {"x": random(1, tokens, hidden), "vec": vec, "pe": _example_pe(tokens, hidden // heads, random)}


def _example_mod(hidden, random):
    return SimpleNamespace(shift=random(1, 1, hidden), scale=random(1, 1, hidden), gate=random(1, 1, hidden))


def _example_pe(tokens, head, random):
    return random(1, 1, tokens, head // 2, 2, 2).float()


# The host's attention() is this attention, after this RoPE where there is a position embedding.
FUNCTIONS = ("attention", "apply_mod", "QKNorm.forward", "Modulation.forward")
ROPE, ATTENTION = "comfy.ldm.flux.math.apply_rope", "comfy.ldm.flux.math.optimized_attention"

# The sources of ComfyUI 0.3.75 to 0.33, of November 2025 to August 2026.
BLOCKS = MappingProxyType({
    "comfy.ldm.flux.layers.DoubleStreamBlock": FusedBlock(double_block, sizes, double_example, FUNCTIONS, ROPE, ATTENTION, frozenset((
        "dd0f30fbb43582ee", "79d4282ac69ae88c", "0c1361d97a1b05bc", "236d51cf45814821", "7c84151b4e00b1f5")),
        ("img_attn.proj", "txt_attn.proj", "img_mlp.2", "txt_mlp.2")),
    "comfy.ldm.flux.layers.SingleStreamBlock": FusedBlock(single_block, sizes, single_example, FUNCTIONS, ROPE, ATTENTION, frozenset((
        "6a3c581479bef19b", "5c1256e41b2851f8", "674295f71104d490", "6a659d8c098406db", "b04521721798160b")), ("linear2",)),
})
