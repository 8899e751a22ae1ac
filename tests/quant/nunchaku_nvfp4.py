"""A small FLUX.1 as a Nunchaku NVFP4 file, which the pack doesn't write: this module quantizes and packs it by the documented formulas."""

import json

import torch
from comfyui_svdquant.cuda import int4, nvfp4
from comfyui_svdquant.quant.checkpoint.header import read_header
from comfyui_svdquant.quant.checkpoint.nunchaku import layout as order
from comfyui_svdquant.quant.checkpoint.nunchaku import names
from comfyui_svdquant.quant.checkpoint.nunchaku import writer as nunchaku_writer
from comfyui_svdquant.quant.families.flux1 import DOUBLE, FAMILY, SINGLE
from safetensors.torch import load_file, save_file

from .nunchaku_places import e4m3_places
from .packed_flux import flux_tensors, packed_flux

TABLES = FAMILY.nunchaku
RANK = 16
QUANTIZATION = {"method": "svdquant", "rank": RANK,
                "weight": {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16},
                "activation": {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}}


def packed_layer(weight, bias, smooth, matrices, seed):
    """{leaf name: tensor} of one layer of theirs. matrices: 3 for q|k|v, each with a second scale of its own, else 1."""
    g = torch.Generator().manual_seed(seed)
    n, k = weight.shape
    up, down = (torch.randn(n, RANK, generator=g) / 8).bfloat16(), (torch.randn(k, RANK, generator=g) / k**0.5 / 8).bfloat16()
    residual = (weight.float() - up.float() @ down.float().t()) * smooth.float()
    second = torch.cat([(part.abs().max() / (6 * 448)).bfloat16().expand(len(part)) for part in residual.chunk(matrices)])
    groups = residual.unflatten(1, (-1, 16)) / second.float().view(-1, 1, 1)
    scales = (groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    values = nvfp4.round_e2m1(groups / scales.float().unsqueeze(-1)).flatten(1)
    codes = (values.unsqueeze(-1) == torch.tensor(nvfp4.VALUES)).int().argmax(-1)  # -0 is 0, which is code 0
    stored = torch.empty(n * k // 16, dtype=torch.uint8)
    stored[e4m3_places(n, k)] = scales.view(torch.uint8)
    leaves = {"qweight": order.pack_codes(int4.pack(codes)), "wscales": stored.view(torch.float8_e4m3fn).view(k // 16, n),
              "bias": order.pack_vector(bias), "smooth": order.pack_vector(smooth), "lora_down": order.pack_down(down),
              "lora_up": order.pack_up(up)}
    leaves["smooth_orig"] = leaves["smooth"].clone()
    return leaves | ({"wtscale": second[:1].clone()} if matrices == 1 else {"wcscales": order.pack_vector(second)})


def parts_of(name, weight, bias):
    """[(weight, bias)] of the one or two layers of theirs that a layer of ours is."""
    if name.endswith("linear1"):
        at = 3 * weight.shape[1]
        return [(weight[:at], bias[:at]), (weight[at:], bias[at:])]
    if name.endswith("linear2"):
        at = weight.shape[0]
        return [(weight[:, :at], torch.zeros_like(bias)), (weight[:, at:], bias)]
    return [(weight, bias)]


def write_nvfp4(path, hidden=128, depth=1, depth_single=1, **changes):
    """Write the file; returns the 16-bit model that it was made of, {name: tensor}."""
    plain = flux_tensors(hidden=hidden, depth=depth, depth_single=depth_single, **changes)
    int4_model = packed_flux(hidden=hidden, depth=depth, depth_single=depth_single, rank=RANK, **changes)
    nunchaku_writer.save(str(path), *int4_model, {}, "flux", True)  # for its metadata and all that is not W4A4
    tensors, metadata = load_file(path), read_header(str(path)).metadata
    for seed, (ours, theirs, kind) in enumerate(names.blocks(TABLES, {DOUBLE: depth, SINGLE: depth_single})):
        for i, (name, parts) in enumerate(TABLES.linears[kind].items()):
            weight, bias = (plain[f"{ours}.{name}.{leaf}"] for leaf in ("weight", "bias"))
            smooth = torch.exp2(torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) * 2 - 1).bfloat16()
            for part, (w, b) in zip(parts, parts_of(name, weight, bias)):
                own = smooth if w.shape[1] == len(smooth) else smooth.split([hidden, 4 * hidden])[w.shape[1] > hidden]
                leaves = packed_layer(w, b, own.contiguous(), 3 if part.startswith("qkv_proj") else 1, 100 * seed + 10 * i + len(part))
                tensors |= {f"{theirs}.{part}.{leaf}": tensor.contiguous() for leaf, tensor in leaves.items()}
    for key in ("svdquant.recipe", "svdquant.source", "svdquant.checksums"):  # of the INT4 file
        del metadata[key]
    save_file(tensors, path, metadata | {"quantization_config": json.dumps(QUANTIZATION)})
    return plain
