"""The forward of Z-Image's blocks, of Lumina's NextDiT, with the elementwise work fused by cuda/block_ops.py and cuda/rms_ops.py, and one
quantization for the SwiGLU's gate and up.

It computes what the forwards of the host's classes compute, whose source was read for every digest in BLOCKS: an RMSNorm and its scale
are one pass; the norms of q and k and RoPE are one; the norm of an update, its gate and its residual (and the norm after it) are one. The
linears and the modulation layers are called as modules and attention through the host's function, so that LoRAs, hooks and attention nodes
work on them as ever. transformer_block returns NotImplemented for a call that it doesn't take; the host's forward then runs.
"""

from types import MappingProxyType

import torch

from ...cuda import block_ops, rms_ops
from .family import FusedBlock
from .fused_parts import in_dtype_of, output

HOST = "comfy.ldm.lumina.model"
NORM_EPS = 1e-5  # the host's usual one, for the comparison


def transformer_block(block, host, x, x_mask, freqs_cis, adaln_input=None, timestep_zero_index=None, transformer_options=None):
    """x (B, L, K), adaln_input (B, C) of a modulated block -> (B, L, K). freqs_cis (B or 1, L, 1, D / 2, 2, 2): the matrices of block_ops'
    pe; host: fused_blocks.Host. Reference images with modulations of their own are for the host's forward."""
    if timestep_zero_index is not None or not _takes(block, host, x, freqs_cis):
        return NotImplemented
    parts = [None] * 4
    if block.modulation:
        parts = block.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=-1)
        if any(part.ndim != 3 or part.shape[0] not in (1, x.shape[0]) or part.shape[2] != x.shape[2] for part in parts):
            return NotImplemented
    scale, gate, mlp_scale, mlp_gate = (part.tanh() if part is not None and i % 2 else part for i, part in enumerate(parts))
    norms, eps = (block.attention_norm2.weight, block.ffn_norm1.weight, block.ffn_norm2.weight), block.attention_norm1.eps
    normed = rms_ops.norm_modulate(x, block.attention_norm1.weight, scale, eps)
    y = _attended(block.attention, host, normed, x_mask, freqs_cis, transformer_options or {})
    x, normed = rms_ops.gated_residual_norm(x, y, norms[0], gate, norms[1], mlp_scale, eps)
    return rms_ops.gated_residual(x, _fed(block.feed_forward, host, normed), norms[2], mlp_gate, eps)


def _attended(attn, host, x, mask, freqs_cis, transformer_options):
    """The attention's output for its normed input x."""
    qkv = output(attn.qkv, x)
    q, k = block_ops.qk_norm_rope([(qkv, attn.q_norm.weight, attn.k_norm.weight)], freqs_cis.transpose(1, 2), attn.n_local_heads, 2,
                                  _head_eps(attn, host, x))
    value = qkv.chunk(3, dim=-1)[2].unflatten(-1, (attn.n_local_heads, -1)).transpose(1, 2)
    joint = host.attention(q, k, value, mask, transformer_options)
    del qkv, q, k, value
    return output(attn.out, in_dtype_of(x, joint))


def _fed(mlp, host, x):
    """The MLP's output for its normed input x."""
    if not host.untouched(mlp, "FeedForward"):
        return output(mlp, x)
    gate, up = (in_dtype_of(x, y) for y in host.outputs((mlp.w1, mlp.w3), x))
    return output(mlp.w2, rms_ops.swiglu(gate, up) if gate.shape == up.shape else torch.nn.functional.silu(gate) * up)


def _head_eps(attn, host, x):
    """The number that the norms of q and k add to the mean square. Newer hosts, whose class keeps qk_norm, compute them together with RoPE,
    and in place of PyTorch's own choice they take float32's."""
    if attn.q_norm.eps is None and hasattr(attn, "qk_norm"):
        return torch.finfo(torch.float32).eps
    return host.norm_eps(attn.q_norm, x)


def _takes(block, host, x, freqs_cis):
    """Whether the fused passes compute this call: on these tensors, and with nothing of the host's or the user's on what they replace."""
    attn = block.attention
    norms = block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2
    return (x.dtype != torch.float16  # newer hosts keep fp16 in its range, in other places than a fused pass could
            and isinstance(freqs_cis, torch.Tensor) and freqs_cis.ndim == 6 and host.takes(block, (x,), freqs_cis.transpose(1, 2))
            and host.untouched(attn, "JointAttention") and attn.n_local_heads == attn.n_local_kv_heads
            and attn.n_local_heads * attn.head_dim == x.shape[-1] == block.dim and freqs_cis.shape[-3] * 2 == attn.head_dim
            and all(host.untouched(norm, "RMSNorm") and norm.weight is not None and norm.eps == norms[0].eps is not None for norm in norms)
            and all(host.untouched(norm, "RMSNorm") and norm.weight is not None and norm.eps == attn.q_norm.eps
                    for norm in (attn.q_norm, attn.k_norm)))


# --- The host's class -------------------------------------------------------------------------------------------------


def sizes(block):
    """(width, heads, whether the block has a modulation layer, whether that is Z-Image's)"""
    return block.dim, block.attention.n_local_heads, block.modulation, block.modulation and len(block.adaLN_modulation) == 1


def example(dim, heads, modulation, of_z_image, random):
    """(arguments of the class, arguments of a forward) with these sizes() and few tokens. random(*shape): a tensor."""
    tokens = 7
    made = {"layer_id": 0, "dim": dim, "n_heads": heads, "n_kv_heads": heads, "multiple_of": 64, "ffn_dim_multiplier": 1.0,
            "norm_eps": NORM_EPS, "qk_norm": True, "modulation": modulation, "z_image_modulation": of_z_image}
    return made, {"x": random(1, tokens, dim), "x_mask": None, "freqs_cis": random(1, tokens, 1, dim // heads // 2, 2, 2).float(),
                  "adaln_input": random(1, min(dim, 256 if of_z_image else 1024)) if modulation else None}


# The sources of ComfyUI 0.3.75 and 0.33, of November 2025 and August 2026.
BLOCKS = MappingProxyType({
    f"{HOST}.JointTransformerBlock": FusedBlock(
        transformer_block, sizes, example,
        functions=("modulate", "apply_gate", "clamp_fp16", "JointAttention.forward", "FeedForward.forward",
                   "FeedForward._forward_silu_gating"),
        rope=f"{HOST}.apply_rope", attention=f"{HOST}.optimized_attention_masked",
        sources=frozenset(("5adb3721b79c1e39", "178cbbb4a5126329")),
        shared=(("feed_forward.w1", "feed_forward.w3"),)),
})
