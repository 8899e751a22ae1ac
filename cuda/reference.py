"""Every op of SVDQuant in plain PyTorch: the tests' reference, and the path without GPU kernels.

One linear layer (arXiv 2411.05007; tensor shapes as in comfy-kitchen's svdquant_w4a4):

    y = Q(x / smooth) Wq^T + (x proj_down) proj_up^T + bias

Q quantizes each token at run time. From column `unsigned_from` on, the input is the output of a GELU: it is shifted by
0.171875 to be non-negative, and its codes are unsigned. The layer's bias already holds the GELU shift correction.
`unsigned_from` is K for an ordinary layer, 0 for the second layer of an MLP, and between the two for a layer whose input
is [attention ; GELU]. The LoRA branch reads x without smoothing.

M tokens, K inputs, N outputs, R the rank, G = K / 64 groups.
"""

import torch
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, silu

from .int4 import GELU_SHIFT, GROUP_SIZE, INT8_MAX, SIGNED_MAX, SIGNED_MIN, UNSIGNED_MAX, unpack_signed, unpack_unsigned

PART_RATIO = 16  # the largest ratio of a token's two int8 scales
FP16_MAX = torch.finfo(torch.float16).max


def scaled_codes(codes, scales):
    """Dequantize codes (rows, K) by scales (rows, G). Both are in the dtype of the result, (rows, K)."""
    return (codes.unflatten(-1, (-1, GROUP_SIZE)) * scales.unsqueeze(-1)).flatten(-2)


def dequantize_weight(weight, weight_scale, dtype=torch.float32):
    """weight: (N, K/2) int8 packed, weight_scale: (G, N). Returns (N, K) in `dtype`."""
    return scaled_codes(unpack_signed(weight).to(dtype), weight_scale.to(dtype).t())


def activation_scales(groups, first_unsigned):
    """The scales of 4-bit activations. groups: (M, G, 64) smoothed, and shifted from group `first_unsigned` on. Returns (M, G).

    A signed group's largest magnitude gets code -8; if that number is positive, the scale is negative. The steps are an eighth smaller
    than those of symmetric_scales, which lowers the energy of the rounding error by 22 % for normal, Laplace and Student-t groups,
    including the few numbers clipped at 7. The kernel makes one more comparison per number; the GEMM's cost doesn't change.
    """
    high, low = groups.amax(dim=-1), groups.amin(dim=-1)
    scales = torch.where(high >= -low, -high, -low) / -SIGNED_MIN
    scales[:, first_unsigned:] = symmetric_scales(groups, first_unsigned)[:, first_unsigned:]
    return scales


def symmetric_scales(groups, first_unsigned):
    """activation_scales as SVDQuant publishes them and other software computes them: codes -7..7, symmetric for +max and -max.
    Comparisons with other software use them."""
    scales = groups.abs().amax(dim=-1)
    scales[:, :first_unsigned] /= SIGNED_MAX
    scales[:, first_unsigned:] /= UNSIGNED_MAX
    return scales


def quantize_activation(x, smooth, unsigned_from, act_bits=4, dtype=torch.float32):
    """Smooth and quantize each token.

    x: (M, K) float; smooth: (K,) float, the divisor; unsigned_from: int, a multiple of 64.
    act_bits 4: activation_scales, one scale per token and group of 64; signed codes -8..7, or 0..15 from `unsigned_from` on.
    act_bits 8: one scale per token and part (the columns before and from `unsigned_from`); codes -127..127. The smaller of a token's
    two scales is at least a 16th of the other, so that a kernel can convert integer sums from one scale to the other.
    Returns codes (M, K) as whole numbers in `dtype`, and scales (M, G) in `dtype`.

    A NaN or Inf in a token makes its scale, and so its output, NaN: the error stays visible.
    """
    shifted = x.to(dtype)
    if unsigned_from < x.shape[-1]:
        shifted = torch.cat((shifted[:, :unsigned_from], shifted[:, unsigned_from:] + GELU_SHIFT), dim=-1)
    groups = (shifted / smooth.to(dtype)).unflatten(-1, (-1, GROUP_SIZE))  # (M, G, 64)
    first_unsigned = unsigned_from // GROUP_SIZE
    if act_bits == 8:
        absmax = groups.abs().amax(dim=-1)  # (M, G)
        parts = [part for part in absmax.tensor_split([first_unsigned], dim=-1) if part.shape[-1]]
        largest = [part.amax(dim=-1, keepdim=True) for part in parts]
        least = torch.stack(largest).amax(dim=0) / PART_RATIO
        absmax = torch.cat([torch.maximum(part, least).expand_as(columns) for part, columns in zip(largest, parts)], dim=-1)
        scales = absmax / INT8_MAX
        high = torch.full_like(scales[:1], INT8_MAX)
        low = -high
    else:
        scales = activation_scales(groups, first_unsigned)
        high, low = torch.full_like(scales[:1], SIGNED_MAX), torch.full_like(scales[:1], SIGNED_MIN)
        high[:, first_unsigned:], low[:, first_unsigned:] = UNSIGNED_MAX, 0
    # A group of zeros keeps the scale 0. Dividing by 1 instead of 0 makes its codes 0, not NaN.
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).unsqueeze(-1)
    codes = (groups / divisor).round()
    codes = torch.minimum(torch.maximum(codes, low.unsqueeze(-1)), high.unsqueeze(-1))
    return codes.flatten(-2), scales


def activated(y, gelu_from):
    """Apply GELU in place to the columns of y (..., N) from `gelu_from` on; None: to no column. Returns y."""
    if gelu_from is not None:
        columns = y[..., gelu_from:]
        columns.copy_(gelu(columns, approximate="tanh"))
    return y


def lora_product(x, lora_down, lora_up, lora_strength, lora, n):
    """What LoRA factors add to a layer's n outputs: x (..., K), lora_down (sum of the ranks, K), lora_up as in LayerOperands, all in one
    dtype -> (..., n). lora_strength: (sum of the ranks,) float32; lora: their LoRASizes."""
    lora_act = (linear(x, lora_down) * lora_strength).to(x.dtype).split(lora.ranks, dim=-1)
    sizes = [(stop - start, rank) for (start, stop), rank in zip(lora.rows(n), lora.ranks)]
    ups = lora_up.split([rows * rank for rows, rank in sizes])
    return torch.cat([linear(act, up.view(size)) for act, up, size in zip(lora_act, ups, sizes)], dim=-1)


def expand_branch(codes, scale, dtype):
    """Rows of a low-rank branch in 8 bits as the layer multiplies with them: codes (rows, R) int8 times scale (rows,) bf16, in float32,
    which holds the products exactly, and rounded once to `dtype`."""
    return (codes * scale.float().unsqueeze(-1)).to(dtype)


def svdquant_linear(x, operands, dtype=torch.float32):
    """One SVDQuant layer, computed and accumulated in `dtype`.

    x: (..., K); operands: LayerOperands, whose row_scale isn't used. Returns (..., N) in x.dtype.
    """
    tokens = x.reshape(-1, x.shape[-1])
    act = scaled_codes(*quantize_activation(tokens, operands.smooth, operands.unsigned_from, operands.act_bits, dtype))
    y = act @ dequantize_weight(operands.weight, operands.weight_scale, dtype).t()
    y += (tokens.to(dtype) @ operands.proj_down.to(dtype)) @ operands.proj_up.to(dtype).t()
    if operands.lora_up is not None:
        lora_down = operands.lora_down[operands.proj_up.shape[1]:]
        y += lora_product(tokens.to(dtype), lora_down.to(dtype), operands.lora_up.to(dtype), operands.lora_strength, operands.lora,
                          y.shape[1])
    if operands.bias is not None:
        y += operands.bias.to(dtype)
    return activated(y, operands.gelu_from).to(x.dtype).reshape(*x.shape[:-1], operands.weight.shape[0])


def dequantize_awq(weight, weight_scale, weight_zeros, dtype=torch.float32):
    """weight: (N, K/2) int8, codes 0..15; weight_scale, weight_zeros: (G, N). Returns (N, K) in `dtype`.

    W = (code - 8) * scale + zero, the rule of ComfyUI's awq_w4a16.
    """
    codes = unpack_unsigned(weight).to(dtype) - 8
    zeros = weight_zeros.to(dtype).t().repeat_interleave(GROUP_SIZE, dim=-1)
    return scaled_codes(codes, weight_scale.to(dtype).t()) + zeros


def awq_linear(x, weight, weight_scale, weight_zeros, bias, dtype=torch.float32):
    """One W4A16 layer: 4-bit weights, x unquantized. Shapes as in dequantize_awq; returns (..., N) in x.dtype."""
    y = x.to(dtype) @ dequantize_awq(weight, weight_scale, weight_zeros, dtype).t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def modulate(x, y=None, gate=None, scale=None, shift=None, eps=1e-6, dtype=torch.float32):
    """The elementwise work between a block's linears, computed in `dtype`:

        z = x + gate * y                          with y and gate; without them z is x
        m = LayerNorm(z) * (1 + scale) + shift    with scale and shift

    x, y: (B, L, K); gate, scale, shift: (B, 1, K) or (1, 1, K). Returns (z, m) in x.dtype; None in place of a part that isn't computed.
    In fp16, z is limited to fp16's range and NaN becomes 0, as in ComfyUI's blocks.
    """
    z = m = None
    if y is not None:
        z = x.to(dtype) + gate.to(dtype) * y.to(dtype)
        z = (z.clamp(-FP16_MAX, FP16_MAX).nan_to_num(0) if x.dtype == torch.float16 else z).to(x.dtype)
    if scale is not None:
        normed = layer_norm((x if z is None else z).to(dtype), x.shape[-1:], eps=eps)
        m = (normed * (1 + scale.to(dtype)) + shift.to(dtype)).to(x.dtype)
    return z, m


def rms_modulate(x, y=None, y_weight=None, gate=None, weight=None, scale=None, eps=1e-6, dtype=torch.float32):
    """The elementwise work between the linears of a block with RMSNorms, computed in `dtype`:

        z = x + gate * RMSNorm(y) * y_weight      with y and y_weight; without them z is x
        m = RMSNorm(z) * weight * (1 + scale)     with weight

    x, y: (B, L, K); the weights: (K,); gate, scale: (B, 1, K) or (1, 1, K), or None for a gate of 1 and a scale of 0. Returns (z, m) in
    x.dtype; None in place of a part that isn't computed.
    """
    z, m, columns = None, None, x.shape[-1:]
    if y is not None:
        update = rms_norm(y.to(dtype), columns, y_weight.to(dtype), eps)
        z = (x.to(dtype) + (update if gate is None else gate.to(dtype) * update)).to(x.dtype)
    if weight is not None:
        normed = rms_norm((x if z is None else z).to(dtype), columns, weight.to(dtype), eps)
        m = (normed if scale is None else normed * (1 + scale.to(dtype))).to(x.dtype)
    return z, m


def swiglu(gate, up, dtype=torch.float32):
    """silu(gate) * up, computed in `dtype`, in gate's dtype."""
    return (silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def qk_norm_rope(streams, pe, heads, parts, eps, dtype=torch.float32):
    """The q, k and, with 3 `parts`, v that attention reads, computed in `dtype`: RMSNorm of each head, then its rotation by `pe`.

    streams: [(rows, q's norm (D,), k's norm (D,))], whose tokens follow one another; rows: (B, L, [q | k | v | ..]), or a sequence of
    q, k and v, (B, L, heads * D) each; pe: (B or 1, 1, L of all streams, D / 2, 2, 2), the 2 x 2 matrix of each pair of columns. Returns
    [(B, L, heads, D) in rows' dtype].
    """
    joined, turns = [], pe.transpose(1, 2).to(dtype)
    for part in range(parts):
        of_streams = []
        for rows, *norms in streams:
            width = heads * norms[0].shape[0]
            x = rows[..., part * width:(part + 1) * width] if isinstance(rows, torch.Tensor) else rows[part]
            found, x = x.dtype, x.unflatten(-1, (heads, -1))
            of_streams.append(rms_norm(x.to(dtype), x.shape[-1:], norms[part].to(dtype), eps) if part < 2 else x)
        x = torch.cat(of_streams, dim=1)
        if part < 2:
            x = (turns * x.unflatten(-1, (-1, 1, 2))).sum(dim=-1).flatten(-2)
        joined.append(x.to(found))
    return joined
