"""FLUX.1 by Black Forest Labs: dev, schnell, Fill, Kontext, Canny, Depth and their fine-tunes."""

from types import MappingProxyType

from .family import (
    BlockList,
    Configuration,
    Diffusers,
    Family,
    Gelu,
    Joined,
    Layer,
    Nunchaku,
    Packing,
    Pooled,
    Signature,
    all_unsigned,
)

HEAD = 128  # channels of an attention head
TIMESTEP = 256  # features of a timestep's, or a guidance's, sinusoidal embedding

NORMS = (r"_norm\.weight$", "_norm.scale")  # ComfyUI renamed the q and k norms' scale in 0.14

MODULATION = Layer(Packing.W4A16)  # its input has one token per image
LINEAR = Layer()
MLP_DOWN = Layer(unsigned_from=all_unsigned)


def mlp_up(mlp):
    """The first layer of the MLP `mlp`, a Sequential of (first linear, GELU, second linear)."""
    return Layer(gelu=Gelu(f"{mlp}.1", lambda k, n: 0, f"{mlp}.2"))


DOUBLE_LINEARS = {
    name: layer for stream in ("img", "txt")
    for name, layer in ((f"{stream}_attn.qkv", LINEAR), (f"{stream}_attn.proj", LINEAR),
                        (f"{stream}_mlp.0", mlp_up(f"{stream}_mlp")), (f"{stream}_mlp.2", MLP_DOWN))}
# linear1 = [q k v ; MLP up] has one input; linear2 = [attention out | MLP down] reads [attention output (hidden) ; GELU output].
SINGLE_LINEARS = {
    "linear1": Layer(joined=Joined(rows=True, at=lambda k, n: 3 * k), gelu=Gelu("mlp_act", lambda k, n: 3 * k, "linear2")),
    "linear2": Layer(joined=Joined(rows=False, at=lambda k, n: n), unsigned_from=lambda k, n: n),
}


def double_blocks(layers, mlps=("img_mlp", "txt_mlp")):
    return BlockList("double_blocks", MappingProxyType(layers), ("img", "txt"), mlps=mlps, sequence=("txt", "img"))


def single_blocks(layers):
    return BlockList("single_blocks", MappingProxyType(layers), ("x",), sequence=("x",))


def depth_of(shapes, blocks):
    """The number of blocks in the list `blocks` of tensors {name: shape}, up to the first gap, as ComfyUI counts them."""
    found = {name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")}
    return next(count for count in range(len(found) + 1) if str(count) not in found)


def measure(shapes, usual):
    hidden, width = shapes["img_in.weight"]
    pixels = usual["patch_size"] ** 2
    return {"in_channels": width // pixels, "out_channels": shapes["final_layer.linear.bias"][0] // pixels, "hidden_size": hidden,
            "depth": depth_of(shapes, "double_blocks"), "depth_single_blocks": depth_of(shapes, "single_blocks"),
            "context_in_dim": shapes["txt_in.weight"][1], "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
            "guidance_embed": "guidance_in.in_layer.weight" in shapes}


def linears(shapes):
    """{tensor name: shape} of linears with bias. shapes: {name: (N, K)}."""
    return {f"{name}.{leaf}": shape[:rank] for name, shape in shapes.items() for leaf, rank in (("weight", 2), ("bias", 1))}


def block_tensors(config, modulation):
    """{tensor name: shape} of all blocks. modulation: whether each block has its own modulation layers."""
    hidden, mlp = config["hidden_size"], int(config["hidden_size"] * config["mlp_ratio"])
    shapes, norms = {}, []
    for i in range(config["depth"]):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes |= {f"{stream}_attn.qkv": (3 * hidden, hidden), f"{stream}_attn.proj": (hidden, hidden),
                       f"{stream}_mlp.0": (mlp, hidden), f"{stream}_mlp.2": (hidden, mlp)}
            shapes |= {f"{stream}_mod.lin": (6 * hidden, hidden)} if modulation else {}
            norms.append(f"{stream}_attn.norm")
    for i in range(config["depth_single_blocks"]):
        block = f"single_blocks.{i}"
        shapes |= {f"{block}.linear1": (3 * hidden + mlp, hidden), f"{block}.linear2": (hidden, hidden + mlp)}
        shapes |= {f"{block}.modulation.lin": (3 * hidden, hidden)} if modulation else {}
        norms.append(f"{block}.norm")
    head = (hidden // config["num_heads"],)
    return linears(shapes) | {f"{norm}.{part}_norm.scale": head for norm in norms for part in ("query", "key")}


def tensors(config):
    hidden, pixels = config["hidden_size"], config["patch_size"] ** 2
    shapes = {"img_in": (hidden, config["in_channels"] * pixels), "txt_in": (hidden, config["context_in_dim"]),
              "final_layer.linear": (config["out_channels"] * pixels, hidden), "final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    embedders = {"time_in": TIMESTEP, "vector_in": config["vec_in_dim"]} | ({"guidance_in": TIMESTEP} if config["guidance_embed"] else {})
    for name, width in embedders.items():
        shapes |= {f"{name}.in_layer": (hidden, width), f"{name}.out_layer": (hidden, hidden)}
    return linears(shapes) | block_tensors(config, modulation=True)


def sizes(config):
    return (f"{config['depth']} double and {config['depth_single_blocks']} single blocks, hidden size {config['hidden_size']}, "
            f"{config['in_channels']} channels in")


def figures(config):
    return f"{sizes(config)}, {'with' if config['guidance_embed'] else 'without'} guidance"


PUBLISHED = {"hidden_size": 3072, "depth": 19, "depth_single_blocks": 38}
# {(with guidance, channels in): name}. Krea-dev and Kontext-dev have dev's configuration.
VARIANTS = {(True, 16): "FLUX.1-dev", (False, 16): "FLUX.1-schnell", (True, 96): "FLUX.1-Fill-dev",
            (True, 32): "FLUX.1-Canny-dev or FLUX.1-Depth-dev"}


def variants(config):
    return VARIANTS.get((config["guidance_embed"], config["in_channels"])) if config | PUBLISHED == config else None


def heads(config):
    return {"num_heads": config["hidden_size"] // sum(config["axes_dim"])}


def rope_trouble(config):
    """Configuration.trouble: RoPE rotates pairs of channels, and each head has all the axes."""
    axes, hidden = config["axes_dim"], config["hidden_size"]
    if any(axis % 2 for axis in axes):
        return f"has axes_dim = {axes} in its configuration, but each of these numbers must be even"
    if hidden % sum(axes):
        return f"has axes_dim = {axes} in its configuration, whose sum does not divide the hidden_size {hidden}"
    return None


DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"  # diffusers' lists of blocks

OUTSIDE = MappingProxyType({  # {our module: diffusers' module} outside the blocks
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out"})


def diffusers_tensors(config):
    hidden, mlp = config["hidden_size"], int(config["hidden_size"] * config["mlp_ratio"])
    ours, norms = tensors(config), []
    shapes = {theirs: ours[f"{name}.weight"] for name, theirs in OUTSIDE.items() if f"{name}.weight" in ours}
    for i in range(config["depth"]):
        block = f"{DOUBLE}.{i}"
        shapes |= {f"{block}.attn.{name}": (hidden, hidden) for name in (
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
        for stream in ("", "_context"):
            shapes |= {f"{block}.norm1{stream}.linear": (6 * hidden, hidden), f"{block}.ff{stream}.net.0.proj": (mlp, hidden),
                       f"{block}.ff{stream}.net.2": (hidden, mlp)}
        norms += [f"{block}.attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    for i in range(config["depth_single_blocks"]):
        block = f"{SINGLE}.{i}"
        shapes |= {f"{block}.attn.{name}": (hidden, hidden) for name in ("to_q", "to_k", "to_v")}
        shapes |= {f"{block}.proj_mlp": (mlp, hidden), f"{block}.proj_out": (hidden, hidden + mlp),
                   f"{block}.norm.linear": (3 * hidden, hidden)}
        norms += [f"{block}.attn.{name}" for name in ("norm_q", "norm_k")]
    head = (hidden // config["num_heads"],)
    return linears(shapes) | {f"{norm}.weight": head for norm in norms}


NUNCHAKU = Nunchaku(
    model_classes=("NunchakuFluxTransformer2dModel", "NunchakuFluxTransformer2DModelV2"),
    diffusers_class="FluxTransformer2DModel",
    comfy_class=lambda config: "Flux" if config["guidance_embed"] else "FluxSchnell",
    config=MappingProxyType({
        "axes_dims_rope": "axes_dim", "num_layers": "depth", "num_single_layers": "depth_single_blocks",
        "num_attention_heads": "num_heads", "joint_attention_dim": "context_in_dim", "pooled_projection_dim": "vec_in_dim",
        "guidance_embeds": "guidance_embed"}),
    inputs=("x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1"),  # FLUX.2 has the first two as well
    output="proj_out",
    blocks=MappingProxyType({"double_blocks": DOUBLE, "single_blocks": SINGLE}),
    linears=MappingProxyType({
        DOUBLE: {
            "img_attn.qkv": ("qkv_proj",), "img_attn.proj": ("out_proj",), "img_mlp.0": ("mlp_fc1",), "img_mlp.2": ("mlp_fc2",),
            "txt_attn.qkv": ("qkv_proj_context",), "txt_attn.proj": ("out_proj_context",), "txt_mlp.0": ("mlp_context_fc1",),
            "txt_mlp.2": ("mlp_context_fc2",)},
        SINGLE: {"linear1": ("qkv_proj", "mlp_fc1"), "linear2": ("out_proj", "mlp_fc2")}}),
    modulations=MappingProxyType({
        DOUBLE: {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}, SINGLE: {"modulation.lin": "norm.linear"}}),
    chunks=MappingProxyType({DOUBLE: 6, SINGLE: 3}),  # shift, scale and gate, twice or once
    norms=MappingProxyType({
        DOUBLE: {
            "img_attn.norm.query_norm.scale": "norm_q.weight", "img_attn.norm.key_norm.scale": "norm_k.weight",
            "txt_attn.norm.query_norm.scale": "norm_added_q.weight", "txt_attn.norm.key_norm.scale": "norm_added_k.weight"},
        SINGLE: {"norm.query_norm.scale": "norm_q.weight", "norm.key_norm.scale": "norm_k.weight"}}),
    outside=OUTSIDE,
    optional=("guidance_in.in_layer", "guidance_in.out_layer"),  # schnell has no guidance
    swapped="final_layer.adaLN_modulation.1",  # scale, shift in diffusers' files; shift, scale in ComfyUI's
    modules_v2=MappingProxyType({
        DOUBLE: {
            "attn.to_qkv": "qkv_proj", "attn.add_qkv_proj": "qkv_proj_context", "attn.to_out.0": "out_proj",
            "attn.to_add_out": "out_proj_context", "ff.net.0.proj": "mlp_fc1", "ff.net.2": "mlp_fc2",
            "ff_context.net.0.proj": "mlp_context_fc1", "ff_context.net.2": "mlp_context_fc2", "attn.norm_q": "norm_q",
            "attn.norm_k": "norm_k", "attn.norm_added_q": "norm_added_q", "attn.norm_added_k": "norm_added_k"},
        SINGLE: {"attn.to_qkv": "qkv_proj", "attn.to_out": "out_proj", "attn.norm_q": "norm_q", "attn.norm_k": "norm_k"}}),
)

FAMILY = Family(
    title="FLUX.1",
    architecture="flux-1",
    model_class="comfy.ldm.flux.model.Flux",
    lacks=MappingProxyType({"yak_mlp": "Ovis-Image"}),
    needs=("vector_in",),
    blocks=(double_blocks({"img_mod.lin": MODULATION, "txt_mod.lin": MODULATION, **DOUBLE_LINEARS}),
            single_blocks({"modulation.lin": MODULATION, **SINGLE_LINEARS})),
    outer=MappingProxyType(dict.fromkeys(
        ("final_layer.adaLN_modulation.1", "time_in.out_layer", "vector_in.out_layer", "guidance_in.out_layer"), MODULATION)),
    signature=Signature(
        anchors=("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.norm.key_norm.weight"),
        names=("img_in.weight",),
        parts=(("vector_in.", "LongCat-Image"),),
        lookalikes=(
            ("distilled_guidance_layer", "a Chroma model with parts missing, or under diffusers' names"),
            ("double_stream_modulation_img.lin.", "a FLUX.2 model with parts missing"),
            ("img_mlp.gate_proj.", "an Ovis-Image model"),
            ("context_embedder_norm.", "an Ovis-Image model"),  # in diffusers' naming
            ("time_embed.timestep_embedder.", "a LongCat-Image model"),  # likewise
            ("controlnet_blocks.0.weight", "a ControlNet"),
            ("controlnet_x_embedder.", "a ControlNet"))),
    configuration=Configuration(
        keys=("axes_dim", "theta", "mlp_ratio", "patch_size", "out_channels", "image_model", "in_channels", "hidden_size", "num_heads",
              "depth", "depth_single_blocks", "context_in_dim", "vec_in_dim", "qkv_bias", "guidance_embed"),
        fixed=MappingProxyType({"image_model": "flux", "qkv_bias": True}),
        usual=MappingProxyType({"axes_dim": [16, 56, 56], "theta": 10000, "mlp_ratio": 4.0, "patch_size": 2}),
        matrices=("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"),
        vectors=("final_layer.linear.bias",),
        measure=measure, derive=heads, trouble=rope_trouble),
    tensors=tensors,
    figures=figures,
    variants=variants,
    text_width="context_in_dim",
    # A reference latent at a noise level of its own doubles the rows of the noise levels alone.
    pooled=Pooled("y", ("timestep", "guidance"), ("time_in.", "guidance_in.", "vector_in."), ("ref_latents_method",)),
    encoders="clip_l and t5xxl",
    clip_type="FLUX",
    tokens=(4096, 512, 4608),  # a 1024 x 1024 image, its text, both
    examples=("single_blocks.37.*", "*.linear2 = 128"),
    largest=(("double_blocks.0.img_attn.qkv", 4096, 3072, 9216), ("double_blocks.0.img_mlp.2", 4096, 12288, 3072),
             ("single_blocks.0.linear1", 4608, 3072, 21504), ("single_blocks.0.linear2", 4608, 15360, 3072)),  # 1024 x 1024
    renamed=(NORMS,),
    diffusers=Diffusers(
        # FLUX.2, LongCat-Image and other relatives have the first two as well, but no projection of the pooled text.
        keys=("transformer_blocks.0.attn.norm_added_k.weight", "x_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"),
        blocks=MappingProxyType({"depth": DOUBLE, "depth_single_blocks": SINGLE}),
        tensors=diffusers_tensors,
        measured=MappingProxyType({theirs: ours for ours, theirs in OUTSIDE.items()}), names="flux_to_diffusers"),
    nunchaku=NUNCHAKU,
    fused="flux_blocks",
)
