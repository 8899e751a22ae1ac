"""Chroma by Lodestone: the blocks of FLUX.1 with one small network for all modulation vectors in place of a layer per block."""

from types import MappingProxyType

from .family import Configuration, Family, Signature
from .flux1 import (
    DOUBLE_LINEARS,
    NORMS,
    SINGLE_LINEARS,
    block_tensors,
    depth_of,
    double_blocks,
    heads,
    linears,
    rope_trouble,
    single_blocks,
    sizes,
)

NETWORK = "distilled_guidance_layer"  # computes all modulation vectors once a step; it stays in 16 bits


def measure(shapes, usual):
    hidden, width = shapes["img_in.weight"]
    layers = {name.split(".")[2] for name in shapes if name.startswith(f"{NETWORK}.layers.")}
    return {"in_channels": width, "out_channels": shapes["final_layer.linear.bias"][0], "hidden_size": hidden,
            "depth": depth_of(shapes, "double_blocks"), "depth_single_blocks": depth_of(shapes, "single_blocks"),
            "context_in_dim": shapes["txt_in.weight"][1], "in_dim": shapes[f"{NETWORK}.in_proj.weight"][1],
            "out_dim": shapes[f"{NETWORK}.out_proj.weight"][0], "hidden_dim": shapes[f"{NETWORK}.in_proj.weight"][0],
            "n_layers": len(layers)}


def tensors(config):
    hidden, width = config["hidden_size"], config["hidden_dim"]
    shapes = {"img_in": (hidden, config["in_channels"]), "txt_in": (hidden, config["context_in_dim"]),
              "final_layer.linear": (config["out_channels"], hidden),
              f"{NETWORK}.in_proj": (width, config["in_dim"]), f"{NETWORK}.out_proj": (config["out_dim"], width)}
    for i in range(config["n_layers"]):
        shapes |= {f"{NETWORK}.layers.{i}.{name}": (width, width) for name in ("in_layer", "out_layer")}
    norms = {f"{NETWORK}.norms.{i}.scale": (width,) for i in range(config["n_layers"])}
    return linears(shapes) | norms | block_tensors(config, modulation=False)


FAMILY = Family(
    title="Chroma",
    architecture="chroma",
    model_class="comfy.ldm.chroma.model.Chroma",
    blocks=(double_blocks(DOUBLE_LINEARS), single_blocks(SINGLE_LINEARS)),
    outer=MappingProxyType({}),
    signature=Signature(
        anchors=(f"{NETWORK}.norms.0.scale", f"{NETWORK}.norms.0.weight"),
        names=("img_in.weight", f"{NETWORK}.in_proj.weight"),
        lookalikes=(("nerf_blocks.", "a Chroma Radiance model"),)),
    configuration=Configuration(
        keys=("axes_dim", "theta", "mlp_ratio", "patch_size", "out_channels", "image_model", "in_channels", "hidden_size", "num_heads",
              "depth", "depth_single_blocks", "context_in_dim", "qkv_bias", "in_dim", "out_dim", "hidden_dim", "n_layers"),
        fixed=MappingProxyType({"image_model": "chroma", "qkv_bias": True}),
        usual=MappingProxyType({"axes_dim": [16, 56, 56], "theta": 10000, "mlp_ratio": 4.0, "patch_size": 2}),
        matrices=("img_in.weight", "txt_in.weight", f"{NETWORK}.in_proj.weight", f"{NETWORK}.out_proj.weight"),
        vectors=("final_layer.linear.bias",),
        measure=measure, derive=heads, trouble=rope_trouble),
    tensors=tensors,
    figures=sizes,
    text_width="context_in_dim",
    pooled=None,
    encoders="t5xxl, with CLIPLoader's type chroma",
    clip_type="CHROMA",
    tokens=(4096, 512, 4608),
    examples=("single_blocks.37.*", "*.linear2 = 128"),
    renamed=(NORMS, (rf"^({NETWORK}\.norms\.\d+)\.weight$", r"\1.scale")),
    fused="flux_blocks",
)
