"""The forward of Qwen-Image's blocks, with the elementwise work fused by cuda/block_ops.py and one quantization for q, k and v.

It computes what the forwards of the host's classes compute, whose source was read for every digest in BLOCKS: LayerNorm and modulation are
one pass; RMSNorm, RoPE and the join of text and image are one; a gate and its residual (and the norm after it) are one. The linears and
the modulation layers are called as modules and attention through the host's function, so that LoRAs, hooks and attention nodes work on
them as ever. transformer_block returns NotImplemented for a call that it doesn't take; the host's forward then runs.
"""

from types import MappingProxyType

import torch

from ...cuda import block_ops
from .family import FusedBlock
from .fused_parts import Modulation, added, added_and_norm, in_dtype_of, one_vector, output
from .qwen_image import ADDED_QKV, QKV

HOST = "comfy.ldm.qwen_image.model"
MODULATIONS = 6  # vectors of a stream: shift, scale and gate of the attention, then of the MLP


def transformer_block(block, host, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                      timestep_zero_index=None, transformer_options=None):
    """hidden_states (B, Li, K), encoder_hidden_states (B, Lt, K), temb (B, K) -> (encoder_hidden_states, hidden_states). image_rotary_emb:
    as pe in block_ops; host: fused_blocks.Host. A mask of the text, which older hosts leave out, and reference images with modulations of
    their own are for the host's forward."""
    img, txt = hidden_states, encoder_hidden_states
    if (encoder_hidden_states_mask is not None or timestep_zero_index is not None
            or not _takes(block, host, (img, txt), image_rotary_emb, transformer_options)):
        return NotImplemented
    (img_mod1, img_mod2), (txt_mod1, txt_mod2) = _modulations(block.img_mod(temb)), _modulations(block.txt_mod(temb))
    if not one_vector(img, img_mod1, img_mod2, txt_mod1, txt_mod2):
        return NotImplemented
    attn, eps, tokens = block.attn, block.img_norm1.eps, txt.shape[1]
    txt_in = block_ops.norm_modulate(txt, txt_mod1.scale, txt_mod1.shift, eps)
    txt_qkv = _qkv(host, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), txt_in)
    img_in = block_ops.norm_modulate(img, img_mod1.scale, img_mod1.shift, eps)
    img_qkv = _qkv(host, (attn.to_q, attn.to_k, attn.to_v), img_in)
    streams = (txt_qkv, attn.norm_added_q.weight, attn.norm_added_k.weight), (img_qkv, attn.norm_q.weight, attn.norm_k.weight)
    q, k, v = block_ops.qk_norm_rope(streams, image_rotary_emb, attn.heads, 3, host.norm_eps(attn.norm_q, img))
    del streams, txt_in, txt_qkv, img_in, img_qkv
    joint = host.attention(q, k, v, None, transformer_options or {})
    del q, k, v
    joint = in_dtype_of(img, joint)
    img, img_in = added_and_norm(attn.to_out[0], joint[:, tokens:], img, img_mod1, img_mod2, eps)
    txt, txt_in = added_and_norm(attn.to_add_out, joint[:, :tokens], txt, txt_mod1, txt_mod2, eps)
    del joint
    img = _with_mlp(host, block.img_mlp, img_in, img, img_mod2)
    return _with_mlp(host, block.txt_mlp, txt_in, txt, txt_mod2), img


def _modulations(vectors):
    """The Modulations (of the attention, of the MLP) in a stream's vectors (B, 6 K)."""
    parts = vectors.unsqueeze(1).chunk(MODULATIONS, dim=-1)
    return Modulation(*parts[:3]), Modulation(*parts[3:])


def _qkv(host, layers, x):
    return [in_dtype_of(x, y) for y in host.outputs(layers, x)]


def _with_mlp(host, mlp, x, residual, mod):
    """residual + gate * the MLP's output."""
    if len(mlp.net) == 3 and host.untouched(mlp, "FeedForward") and _does_nothing(mlp.net[1]):
        up, _, down = mlp.net
        return added(down, output(up, x), residual, mod)
    return added(mlp, x, residual, mod)


def _does_nothing(module):
    """Whether a module is a Dropout without effect."""
    return type(module) is torch.nn.Dropout and not module.p and not (module._forward_pre_hooks or module._forward_hooks
                                                                      or "forward" in module.__dict__)


def _takes(block, host, states, pe, transformer_options):
    """Whether the fused passes compute this call: on these tensors, and with nothing of the host's or the user's on what they replace."""
    x, attn, patches = states[0], block.attn, (transformer_options or {}).get("patches") or {}
    norms = block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2
    head_norms = attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k
    eps = host.norm_eps(attn.norm_q, x)
    return (x.dtype != torch.float16  # the passes keep fp16 in its range, as FLUX's blocks do and Qwen-Image's don't
            and "attn1_patch" not in patches and host.takes(block, states, pe)
            and host.untouched(attn, "Attention") and len(attn.to_out) == 2 and _does_nothing(attn.to_out[1])
            and all(host.untouched(norm, "LayerNorm") and norm.weight is None and norm.eps == norms[0].eps for norm in norms)
            and all(host.untouched(norm, "RMSNorm") and norm.weight is not None and host.norm_eps(norm, x) == eps for norm in head_norms)
            and x.shape[-1] == block.dim and pe.shape[-3] * 2 * attn.heads == block.dim)


# --- The host's class -------------------------------------------------------------------------------------------------


def sizes(block):
    """(width, heads, columns of a head)"""
    return block.dim, block.num_attention_heads, block.attention_head_dim


def example(dim, heads, head, random):
    """(arguments of the class, arguments of a forward) with these sizes() and few tokens. random(*shape): a tensor."""
    text, image = 3, 5
    made = {"dim": dim, "num_attention_heads": heads, "attention_head_dim": head}
    return made, {"encoder_hidden_states": random(1, text, dim), "hidden_states": random(1, image, dim),
                  "encoder_hidden_states_mask": None, "temb": random(1, dim),
                  "image_rotary_emb": random(1, 1, text + image, head // 2, 2, 2)}


# The sources of ComfyUI 0.3.75 and 0.33, of November 2025 and August 2026.
BLOCKS = MappingProxyType({
    f"{HOST}.QwenImageTransformerBlock": FusedBlock(
        transformer_block, sizes, example,
        functions=("Attention.forward", "QwenImageTransformerBlock._modulate", "QwenImageTransformerBlock._apply_gate",
                   "FeedForward.forward"),
        rope=f"{HOST}.apply_rope1", attention=f"{HOST}.optimized_attention_masked",
        sources=frozenset(("9f2aaf486cc8c6f4", "7f86406fc41db10d")),
        gated=("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2"),
        shared=(QKV, ADDED_QKV)),
})
