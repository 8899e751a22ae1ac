"""The model in tests/data/golden: a FLUX.1 of one block of each kind, whose tensors are formulas, so that they are known without the code
that wrote the files.

Each file was written by the version of the pack that the table names. To write the file of a new version, run this module with the root
of the pack: python tests/quant/golden_model.py ROOT native|native_nvfp4|native_int8_branch|nunchaku OUT.safetensors; then compress it
with gzip -9n.
"""

import importlib
import sys
import types
import zlib

import numpy as np
import torch

HIDDEN, CONTEXT, POOLED, RANK = 128, 64, 64, 16
W4A4, SPLIT, NVFP4, AWQ = "svdquant_w4a4", "svdquant_w4a4_split", "svdquant_nvfp4", "awq_w4a16"
CONFIG = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": HIDDEN, "num_heads": 1, "depth": 1,
          "depth_single_blocks": 1, "context_in_dim": CONTEXT, "vec_in_dim": POOLED, "mlp_ratio": 4.0, "qkv_bias": True,
          "guidance_embed": True, "axes_dim": [16, 56, 56], "theta": 10000}
RECIPE = {"preset": "data-free", "rank": RANK}
FILES = {  # {file: (what wrote it, svdquant.version and svdquant.minor in it)}
    "native_1": ("the first version of the pack", "1", None), "native_1_nvfp4": ("the first version with NVFP4 layers", "1", None),
    "native_2": ("the first version with int8 scales", "2", None), "native_2_1": ("the first version with checksums", "2", "1"),
    "native_3_int8_branch": ("the first version with branches in 8 bits", "3", "1"),
    "nunchaku_1": ("the first version that wrote Nunchaku's layout", None, None),
    "nunchaku_2": ("the first version with checksums", None, None),
}


def layers(nvfp4=False):
    """{name: (format, K, N, first unsigned column)} of the packed layers."""
    found = {}
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        found |= {f"{block}_mod.lin": (AWQ, 1, 6, 1), f"{block}_attn.qkv": (W4A4, 1, 3, 1), f"{block}_attn.proj": (W4A4, 1, 1, 1),
                  f"{block}_mlp.0": (W4A4, 1, 4, 1), f"{block}_mlp.2": (W4A4, 4, 1, 0)}
    block = "single_blocks.0"
    found |= {f"{block}.linear1": (W4A4, 1, 7, 1), f"{block}.linear2": (SPLIT, 5, 1, 1), f"{block}.modulation.lin": (AWQ, 1, 3, 1)}
    if nvfp4:  # without unsigned columns
        found = {name: entry if entry[0] == AWQ else (NVFP4, *entry[1:3], entry[1]) for name, entry in found.items()}
    return {name: (kind, *(HIDDEN * size for size in sizes)) for name, (kind, *sizes) in found.items()}


def tensors(nvfp4=False, int8_branch=False):
    """{name: tensor} of the model, as it is after loading."""
    shapes = {f"{norm}.{qk}_norm.scale": (128,) for norm in ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm",
                                                             "single_blocks.0.norm") for qk in ("query", "key")}
    linears = {"img_in": (HIDDEN, 64), "txt_in": (HIDDEN, CONTEXT), "final_layer.linear": (64, HIDDEN),
               "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN)}
    for embedder, width in (("time_in", 256), ("vector_in", POOLED), ("guidance_in", 256)):
        linears |= {f"{embedder}.in_layer": (HIDDEN, width), f"{embedder}.out_layer": (HIDDEN, HIDDEN)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    found = {name: values(name, shape) for name, shape in shapes.items()}
    for name, (kind, k, n, _) in layers(nvfp4).items():
        found |= {f"{name}.{part}": tensor for part, tensor in packed(name, kind, k, n, int8_branch).items()}
    return found


def packed(name, kind, k, n, int8_branch):
    """{part: tensor} of one packed layer."""
    codes = pattern(f"{name}.weight", n * k // 2, 251).astype(np.uint8).view(np.int8)
    found = {"weight": torch.from_numpy(codes).view(n, k // 2), "bias": values(f"{name}.bias", (n,))}
    group, row = torch.arange(k // (16 if kind == NVFP4 else 64)).unsqueeze(1), torch.arange(n)
    row_scale = (1 + row % 3) / 128
    found["weight_scale"] = (row_scale * (1 + (5 * group + row) % 15)).bfloat16()  # a whole number times that of its row, exactly
    if kind == NVFP4:
        found["weight_scale"] = (0x30 + (group + row) % 16).to(torch.uint8).view(torch.float8_e4m3fn)
        found["weight_scale_2"] = row_scale.unsqueeze(0).float()
    if kind == AWQ:
        return found | {"weight_zeros": values(f"{name}.weight_zeros", (len(group), n))}
    smooth = {"weight_smooth_factor": values(f"{name}.smooth", (k,)).abs() + 0.5}
    if int8_branch:
        codes = torch.from_numpy(pattern(f"{name}.branch", (k + n) * RANK, 255) - 127).to(torch.int8).view(k + n, RANK)
        scale = (values(f"{name}.branch_scale", (k + n,)).abs() + 1) / 256
        return found | {"weight_proj_down": codes[:k], "weight_proj_up": codes[k:], "weight_proj_scale": scale} | smooth
    return found | {"weight_proj_down": values(f"{name}.weight_proj_down", (k, RANK)), "weight_proj_up": values(f"{name}.up", (n, RANK))
                    } | smooth


def pattern(name, count, period):
    """Numbers below `period` that repeat, so that the files compress well."""
    index = np.arange(count)
    return (7 * index + 3 * (index // 64) + zlib.crc32(name.encode())) % period


def values(name, shape):
    """Multiples of 1/64 from -30/64 to 30/64, which bf16 holds exactly."""
    return ((torch.from_numpy(pattern(name, int(np.prod(shape)), 61)) - 30) / 64).bfloat16().view(shape)


def main(root, form, path):
    package = types.ModuleType("pack")  # without the nodes, which need ComfyUI
    package.__path__, sys.modules["pack"] = [root], package

    def first(*names):
        for name in names:
            try:
                return importlib.import_module(f"pack.{name}")
            except ModuleNotFoundError:
                continue
        raise SystemExit(f"none of {names} is in {root}")

    layout = first("quant.layers.layout", "quant.layout")
    writer = (first("quant.checkpoint.nunchaku.writer", "quant.checkpoint.nunchaku_write") if form == "nunchaku"
              else first("quant.checkpoint.native"))
    how = {"nvfp4": form == "native_nvfp4"}
    if form == "native_int8_branch":
        how["int8_branch"] = True
    specs = {name: layout.LayerSpec(kind, k, n, 0 if kind == AWQ else RANK, unsigned,
                                    **({"branch_bits": 8} if "int8_branch" in how and kind != AWQ else {}))
             for name, (kind, k, n, unsigned) in layers(how["nvfp4"]).items()}
    writer.save(path, tensors(**how), specs, CONFIG, RECIPE, "golden")


if __name__ == "__main__":
    main(*sys.argv[1:])
