"""FLUX.2 by Black Forest Labs: dev and klein. FLUX.1's blocks without biases, with SwiGLU MLPs, and one modulation for all blocks."""

from types import MappingProxyType

from .family import Configuration, Family, Joined, Layer, Nunchaku, Packing, Signature
from .flux1 import DOUBLE, NORMS, SINGLE, TIMESTEP, depth_of, double_blocks, figures, heads, rope_trouble, single_blocks

LINEAR = Layer(bias=False)
MODULATION = Layer(Packing.W4A16, bias=False)
STREAMS = ("img", "txt")

# SwiGLU multiplies a SiLU by another half of the layer's output, so the next layer's inputs have both signs.
DOUBLE_LINEARS = {f"{stream}_{name}": LINEAR for stream in STREAMS for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")}
# linear1 = [q k v ; MLP up] has one input; linear2 = [attention out | MLP down] reads [attention output (hidden) ; SwiGLU's output].
SINGLE_LINEARS = {
    "linear1": Layer(joined=Joined(rows=True, at=lambda k, n: 3 * k), bias=False),
    "linear2": Layer(joined=Joined(rows=False, at=lambda k, n: n), bias=False),
}
# Computed once a step for all blocks: {module: number of its shifts, scales and gates}.
MODULATIONS = {"double_stream_modulation_img.lin": 6, "double_stream_modulation_txt.lin": 6, "single_stream_modulation.lin": 3,
               "final_layer.adaLN_modulation.1": 2}


def measure(shapes, usual):
    hidden, width = shapes["img_in.weight"]
    pixels = usual["patch_size"] ** 2
    return {"in_channels": width // pixels, "out_channels": shapes["final_layer.linear.weight"][0] // pixels, "hidden_size": hidden,
            "depth": depth_of(shapes, "double_blocks"), "depth_single_blocks": depth_of(shapes, "single_blocks"),
            "context_in_dim": shapes["txt_in.weight"][1], "guidance_embed": "guidance_in.in_layer.weight" in shapes}


def tensors(config):
    hidden, ratio, pixels = config["hidden_size"], config["mlp_ratio"], config["patch_size"] ** 2
    mlp, gated = int(hidden * ratio), int(hidden * ratio * 2)  # the host rounds them apart in single blocks
    head = (hidden // config["num_heads"],)
    shapes = {"img_in": (hidden, config["in_channels"] * pixels), "txt_in": (hidden, config["context_in_dim"]),
              "final_layer.linear": (config["out_channels"] * pixels, hidden)}
    shapes |= {name: (chunks * hidden, hidden) for name, chunks in MODULATIONS.items()}
    for name in ("time_in", *(("guidance_in",) if config["guidance_embed"] else ())):
        shapes |= {f"{name}.in_layer": (hidden, TIMESTEP), f"{name}.out_layer": (hidden, hidden)}
    norms = []
    for stream in (f"double_blocks.{i}.{stream}" for i in range(config["depth"]) for stream in STREAMS):
        shapes |= {f"{stream}_attn.qkv": (3 * hidden, hidden), f"{stream}_attn.proj": (hidden, hidden),
                   f"{stream}_mlp.0": (2 * mlp, hidden), f"{stream}_mlp.2": (hidden, mlp)}
        norms.append(f"{stream}_attn.norm")
    for block in (f"single_blocks.{i}" for i in range(config["depth_single_blocks"])):
        shapes |= {f"{block}.linear1": (3 * hidden + gated, hidden), f"{block}.linear2": (hidden, hidden + mlp)}
        norms.append(f"{block}.norm")
    return ({f"{name}.weight": shape for name, shape in shapes.items()}
            | {f"{norm}.{part}_norm.scale": head for norm in norms for part in ("query", "key")})


# {(hidden size, double blocks, single blocks): name}. The base models have the tensors of those distilled from them.
VARIANTS = {(6144, 8, 48): "FLUX.2-dev", (3072, 5, 20): "FLUX.2-klein-4B", (4096, 8, 24): "FLUX.2-klein-9B"}

# Nunchaku publishes no FLUX.2. Others publish klein in files of the second version for nunchaku-lite, whose adapter has these names. That
# qkv_proj and mlp_fc1 of a single block have one smoothing factor, as in FLUX.1's files, is inferred; other files are refused.
EMBEDDED = "time_guidance_embed"
NUNCHAKU = Nunchaku(
    model_classes=("NunchakuFlux2Transformer2DModel",),
    config=MappingProxyType({
        "axes_dims_rope": "axes_dim", "rope_theta": "theta", "mlp_ratio": "mlp_ratio", "num_layers": "depth",
        "num_single_layers": "depth_single_blocks", "num_attention_heads": "num_heads", "joint_attention_dim": "context_in_dim"}),
    inputs=("x_embedder", "context_embedder", "double_stream_modulation_img.linear"),
    blocks=MappingProxyType({"double_blocks": DOUBLE, "single_blocks": SINGLE}),
    linears=MappingProxyType({
        DOUBLE: {
            "img_attn.qkv": ("attn.to_qkv",), "img_attn.proj": ("attn.to_out.0",), "img_mlp.0": ("ff.linear_in",),
            "img_mlp.2": ("ff.linear_out",), "txt_attn.qkv": ("attn.to_added_qkv",), "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.linear_in",), "txt_mlp.2": ("ff_context.linear_out",)},
        SINGLE: {"linear1": ("attn.qkv_proj", "attn.mlp_fc1"), "linear2": ("attn.out_proj", "attn.mlp_fc2")}}),
    norms=MappingProxyType({
        DOUBLE: {
            "img_attn.norm.query_norm.scale": "attn.norm_q.weight", "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
            "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight", "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight"},
        SINGLE: {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}}),
    outside=MappingProxyType({
        "img_in": "x_embedder", "txt_in": "context_embedder",
        "time_in.in_layer": f"{EMBEDDED}.timestep_embedder.linear_1", "time_in.out_layer": f"{EMBEDDED}.timestep_embedder.linear_2",
        "guidance_in.in_layer": f"{EMBEDDED}.guidance_embedder.linear_1",
        "guidance_in.out_layer": f"{EMBEDDED}.guidance_embedder.linear_2",
        **{name: f"{name.removesuffix('.lin')}.linear" for name in MODULATIONS if name.endswith(".lin")},
        "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out"}),
    leaves=("weight",),
    optional=("guidance_in.in_layer", "guidance_in.out_layer"),  # klein has no guidance
    swapped="final_layer.adaLN_modulation.1",  # scale, shift in diffusers' files; shift, scale in ComfyUI's
    modules_v2=MappingProxyType({DOUBLE: {}, SINGLE: {}}),
)

FAMILY = Family(
    title="FLUX.2",
    architecture="flux-2",
    model_class="comfy.ldm.flux.model.Flux",
    blocks=(double_blocks(DOUBLE_LINEARS, mlps=()), single_blocks(SINGLE_LINEARS)),
    outer=MappingProxyType(dict.fromkeys((*MODULATIONS, "time_in.out_layer", "guidance_in.out_layer"), MODULATION)),
    signature=Signature(
        anchors=("double_stream_modulation_img.lin.weight",),
        names=("img_in.weight", "txt_in.weight"),
        lookalikes=(("double_stream_modulation_img.linear.", "a FLUX.2 model under diffusers' names, which ComfyUI does not read"),)),
    configuration=Configuration(
        keys=("axes_dim", "theta", "mlp_ratio", "patch_size", "out_channels", "image_model", "in_channels", "hidden_size", "num_heads",
              "depth", "depth_single_blocks", "context_in_dim", "qkv_bias", "guidance_embed", "global_modulation", "mlp_silu_act",
              "ops_bias"),
        fixed=MappingProxyType({"image_model": "flux2", "qkv_bias": False, "global_modulation": True, "mlp_silu_act": True,
                                "ops_bias": False}),
        usual=MappingProxyType({"axes_dim": [32, 32, 32, 32], "theta": 2000, "mlp_ratio": 3.0, "patch_size": 1}),
        matrices=("img_in.weight", "txt_in.weight", "final_layer.linear.weight"),
        vectors=(),
        measure=measure, derive=heads, trouble=rope_trouble),
    tensors=tensors,
    figures=figures,
    variants=lambda config: VARIANTS.get((config["hidden_size"], config["depth"], config["depth_single_blocks"])),
    text_width="context_in_dim",
    pooled=None,
    encoders="Mistral Small 3 for dev, Qwen3 for klein, with CLIPLoader's type flux2",
    clip_type="FLUX2",
    cell=16,
    tokens=(4096, 512, 4608),  # a 1024 x 1024 image, its text, both
    examples=("single_blocks.47.*", "*.linear2 = 128"),
    renamed=(NORMS,),
    nunchaku=NUNCHAKU,
    fused="flux_blocks",
)
