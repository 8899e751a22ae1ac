"""Small Qwen-Images and Z-Images as Nunchaku files, which the pack doesn't write, and a decoder of such files.

The encoder and the decoder know the format's description (nunchaku_places.py) and the names in nunchaku's own classes. They use nothing of
the pack's reader and none of its tables.
"""

import json

import torch

from . import nunchaku_places as places
from .random_models import random_tensors
from .random_qwen_image import qwen_image_shapes
from .random_z_image import z_image_shapes

RANK, SHIFT = 16, 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
INT4 = {"method": "svdquant", "rank": RANK, "weight": {"dtype": "int4", "scale_dtype": None, "group_size": 64},
        "activation": {"dtype": "int4", "scale_dtype": None, "group_size": 64}}
NVFP4 = {"method": "svdquant", "rank": RANK, "weight": {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16},
         "activation": {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}}


# --- names -----------------------------------------------------------------------------------------------------------


def qwen_layers(depth=1):
    """({Nunchaku's W4A4 layer: [our layers in it]}, {modulation layers}, {our tensor: Nunchaku's})."""
    layers, modulations = {}, []
    for block in (f"transformer_blocks.{i}" for i in range(depth)):
        layers[f"{block}.attn.to_qkv"] = [f"{block}.attn.to_{x}" for x in "qkv"]
        layers[f"{block}.attn.add_qkv_proj"] = [f"{block}.attn.add_{x}_proj" for x in "qkv"]
        for name in ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"):
            layers[f"{block}.{name}"] = [f"{block}.{name}"]
        modulations += [f"{block}.img_mod.1", f"{block}.txt_mod.1"]
    return layers, modulations, lambda name: name


def z_layers(depth=2, refiners=1):
    """As qwen_layers; its modulation is in 16 bits."""
    layers = {}
    for block in (f"{kind}.{i}" for kind, count in (("layers", depth), ("noise_refiner", refiners), ("context_refiner", refiners))
                  for i in range(count)):
        layers |= {f"{block}.attention.to_qkv": [f"{block}.attention.qkv"], f"{block}.attention.to_out.0": [f"{block}.attention.out"],
                   f"{block}.feed_forward.net.0.proj": [f"{block}.feed_forward.w3", f"{block}.feed_forward.w1"],
                   f"{block}.feed_forward.net.2": [f"{block}.feed_forward.w2"]}

    def theirs(name):
        for ours, other in ((".q_norm.", ".norm_q."), (".k_norm.", ".norm_k."), ("x_embedder.", "all_x_embedder.2-1."),
                            ("final_layer.", "all_final_layer.2-1.")):
            if ours in name or name.startswith(ours):
                return name.replace(ours, other)
        return name

    return layers, [], theirs


CONFIGS = {
    "NunchakuQwenImageTransformer2DModel": {
        "_class_name": "QwenImageTransformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False,
        "in_channels": 64, "joint_attention_dim": 128, "num_attention_heads": 2, "num_layers": 1, "out_channels": 16, "patch_size": 2},
    "NunchakuZImageTransformer2DModel": {
        "_class_name": "ZImageTransformer2DModel", "all_f_patch_size": [1], "all_patch_size": [2], "axes_dims": [32, 48, 48],
        "axes_lens": [1024, 512, 512], "cap_feat_dim": 128, "dim": 256, "in_channels": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2,
        "n_refiner_layers": 1, "norm_eps": 1e-05, "qk_norm": True, "rope_theta": 256.0, "t_scale": 1000.0},
}
QWEN, Z_IMAGE = CONFIGS
LAYERS = {QWEN: qwen_layers, Z_IMAGE: z_layers}
SHAPES = {QWEN: lambda: qwen_image_shapes(depth=1), Z_IMAGE: lambda: z_image_shapes(depth=2, refiners=1)}


def is_after_gelu(layer):
    return layer.endswith("_mlp.net.2")


# --- encoding --------------------------------------------------------------------------------------------------------


def placed(values, where):
    """A flat array that has `values` at the offsets `where`."""
    flat = torch.empty(values.numel(), dtype=values.dtype)
    flat[where.flatten()] = values.flatten()
    return flat


def placed_codes(codes):
    """(N, K) unsigned codes -> (N, K/2) int8."""
    byte, high = places.code_places(*codes.shape)
    data = torch.zeros(codes.numel() // 2, dtype=torch.uint8)
    for half, shift in ((~high[0], 0), (high[0], 4)):
        data[byte[:, half].flatten()] |= (codes[:, half].to(torch.uint8) << shift).flatten()
    return data.view(torch.int8).view(len(codes), -1)


def encoded(layer, matrices, biases, nvfp4, seed):
    """{leaf: tensor} of one of Nunchaku's W4A4 layers, of matrices (N, K) that read one input. biases: [] for a layer without."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.cat(matrices).float()
    n, k = weight.shape
    smooth = torch.exp2(torch.rand(k, generator=g) * 2 - 1).bfloat16()
    up, down = (torch.randn(n, RANK, generator=g) / 8).bfloat16(), (torch.randn(k, RANK, generator=g) / k**0.5 / 8).bfloat16()
    residual = (weight - up.float() @ down.float().t()) * smooth.float()
    leaves = {"smooth_factor": placed(smooth, places.vector_places(k)), "smooth_factor_orig": placed(smooth, places.vector_places(k)),
              "proj_down": placed(down, places.down_places(k, RANK)).view(k, RANK),
              "proj_up": placed(up, places.up_places(n, RANK)).view(n, RANK)}
    if nvfp4:
        second = torch.cat([(part.abs().max() / (6 * 448)).bfloat16().expand(len(matrix))
                            for matrix, part in zip(matrices, residual.split([len(matrix) for matrix in matrices]))])
        groups = residual.unflatten(1, (-1, 16)) / second.float().view(-1, 1, 1)
        scales = (groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
        magnitude = (groups / scales.float().unsqueeze(-1)).abs().clamp(max=6)
        codes = (magnitude.unsqueeze(-1) - E2M1).abs().argmin(-1)
        codes = (codes + 8 * ((groups < 0) & (codes > 0))).flatten(1)
        stored = placed(scales.view(torch.uint8), places.e4m3_places(n, k)).view(torch.float8_e4m3fn)
        leaves |= {"wtscale": second[:1].clone()} if len(matrices) == 1 else {"wcscales": placed(second, places.vector_places(n))}
    else:
        groups = residual.unflatten(1, (-1, 64))
        scales = (groups.abs().amax(-1) / 7).bfloat16()
        codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-7, 7).int().flatten(1) & 15
        stored = placed(scales, places.scale_places(n, k))
    leaves |= {"qweight": placed_codes(codes), "wscales": stored.view(-1, n)}
    if biases:
        bias = torch.cat(biases).float()
        if is_after_gelu(layer) and not nvfp4:
            bias -= SHIFT * decoded_weight(leaves, nvfp4)[0].div(smooth.float()).sum(1)
        leaves["bias"] = placed(bias.bfloat16(), places.vector_places(n))
    return leaves


def encoded_modulation(weight, bias):
    """{leaf: tensor} of one of Nunchaku's W4A16 layers with six chunks."""
    n, k = weight.shape
    order = torch.arange(n).view(6, -1).t().flatten()  # the file's row -> ours
    groups = weight.float()[order].unflatten(1, (-1, 64))
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    zero = (-7 * scale.float()).bfloat16()
    codes = ((groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round().clamp(0, 15).int().flatten(1)
    word, shift = places.w4a16_places(n, k)
    words = torch.zeros(n * k // 4, dtype=torch.int64).index_add_(0, word.flatten(), (codes << shift).flatten())
    words = torch.where(words > 32767, words - 65536, words).to(torch.int16)
    raised = bias.float().view(6, -1).clone()
    raised[[1, 4]] += 1
    padded = torch.nn.functional.pad(torch.stack((scale, zero)).transpose(1, 2), (0, 0, 0, -(k // 64) % 16)).contiguous()
    return {"qweight": words.view(torch.int32).view(n // 4, k // 2), "wscales": padded[0].clone(), "wzeros": padded[1].clone(),
            "bias": raised.flatten()[order].bfloat16()}


def encoded_model(kind, nvfp4=False, skip_refiners=False):
    """({Nunchaku's name: tensor}, metadata, {our name: tensor} of the 16-bit model). kind: QWEN or Z_IMAGE; skip_refiners: leaves a
    Z-Image's refiners in 16 bits."""
    plain = random_tensors(SHAPES[kind]())
    rest, tensors = dict(plain), {}
    layers, modulations, theirs = LAYERS[kind]()
    for seed, (part, ours) in enumerate(layers.items()):
        weights = [rest.pop(f"{name}.weight") for name in ours]
        if skip_refiners and "refiner" in part:
            pieces = {"to_q": 0, "to_k": 1, "to_v": 2}
            tensors |= ({f"{part.replace('to_qkv', name)}.weight": weights[0].chunk(3)[i] for name, i in pieces.items()}
                        if part.endswith("to_qkv") else {f"{part}.weight": torch.cat(weights)})
            continue
        biases = [rest.pop(f"{name}.bias") for name in ours if f"{name}.bias" in rest]
        matrices = [piece for weight in weights for piece in (weight.chunk(3) if part.endswith("attention.to_qkv") else [weight])]
        tensors |= {f"{part}.{leaf}": tensor for leaf, tensor in encoded(part, matrices, biases, nvfp4, seed).items()}
    for name in modulations:
        own = encoded_modulation(rest.pop(f"{name}.weight"), rest.pop(f"{name}.bias"))
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in own.items()}
    tensors |= {theirs(name): tensor for name, tensor in rest.items()}
    quantization = (NVFP4 if nvfp4 else INT4) | ({"skip_refiners": skip_refiners} if kind == Z_IMAGE else {})
    metadata = {"model_class": kind, "config": json.dumps(CONFIGS[kind]), "quantization_config": json.dumps(quantization)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata, plain


# --- decoding --------------------------------------------------------------------------------------------------------


def decoded_weight(leaves, nvfp4):
    """((N, K) float32: codes times scales, before the division by the smoothing factor; N; K)."""
    n, k = leaves["qweight"].shape[0], leaves["qweight"].shape[1] * 2
    byte, high = places.code_places(n, k)
    data = leaves["qweight"].flatten().view(torch.uint8)[byte].int()
    codes = torch.where(high, data >> 4, data & 15)
    if not nvfp4:
        values, scales = torch.where(codes > 7, codes - 16, codes).float(), leaves["wscales"].flatten()[places.scale_places(n, k)].float()
    else:
        values = E2M1[codes % 8] * torch.where(codes > 7, -1, 1)
        scales = leaves["wscales"].flatten().view(torch.uint8)[places.e4m3_places(n, k)].view(torch.float8_e4m3fn).float()
        scales = scales * leaves.get("wtscale", torch.ones(1)).float()
        if "wcscales" in leaves:
            scales = scales * leaves["wcscales"][places.vector_places(n)].float().unsqueeze(1)
    return values * scales.repeat_interleave(k // scales.shape[1], 1), n, k


class Decoded:
    """A W4A4 layer of a file, computed in float32. NVFP4's activations are rounded as Nunchaku's kernels do; INT4's are not, since kernels
    may round them to more bits."""

    def __init__(self, tensors, layer, nvfp4):
        leaves = {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
        self.nvfp4 = nvfp4
        self.weight, n, k = decoded_weight(leaves, nvfp4)
        self.smooth = leaves["smooth_factor"][places.vector_places(k)].float()
        rank = leaves["proj_down"].shape[1]
        self.down = leaves["proj_down"].flatten()[places.down_places(k, rank)].float()
        self.up = leaves["proj_up"].flatten()[places.up_places(n, rank)].float()
        self.bias = leaves["bias"][places.vector_places(n)].float() if "bias" in leaves else torch.zeros(n)
        if is_after_gelu(layer) and not nvfp4:
            self.bias = self.bias + SHIFT * (self.weight / self.smooth).sum(1)

    def __call__(self, x):
        smoothed = x.float() / self.smooth
        if self.nvfp4:
            groups = smoothed.unflatten(-1, (-1, 16))
            scale = groups.abs().amax(-1, keepdim=True) / 6  # kernels divide by it, and multiply by what e4m3 holds of it
            magnitude = (groups / scale.clamp(min=1e-30)).abs().clamp(max=6)
            scale = scale.clamp(max=448).to(torch.float8_e4m3fn).float()
            smoothed = (E2M1[(magnitude.unsqueeze(-1) - E2M1).abs().argmin(-1)] * groups.sign() * scale).flatten(-2)
        return (smoothed @ self.weight.t() + (x.float() @ self.down) @ self.up.t() + self.bias).to(x.dtype)


def decoded_modulation(tensors, layer):
    """(weight, bias) of a W4A16 layer of a file, rows in our order, float32."""
    n, k = tensors[f"{layer}.qweight"].shape[0] * 4, tensors[f"{layer}.qweight"].shape[1] * 2
    word, shift = places.w4a16_places(n, k)
    codes = (tensors[f"{layer}.qweight"].flatten().view(torch.int16).int()[word] >> shift & 15).float()
    scale, zero = (tensors[f"{layer}.{leaf}"][: k // 64].t().float().repeat_interleave(64, 1) for leaf in ("wscales", "wzeros"))
    ours = torch.arange(n).view(-1, 6).t().flatten()  # our row -> the file's
    bias = tensors[f"{layer}.bias"].float()[ours].view(6, -1).clone()
    bias[[1, 4]] -= 1
    return (codes * scale + zero)[ours], bias.flatten()
