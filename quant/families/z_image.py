"""Z-Image by Tongyi-MAI: Z-Image, Z-Image-Turbo and their fine-tunes, on the NextDiT of Lumina 2."""

from types import MappingProxyType

from .family import BlockList, Configuration, Family, Layer, Nunchaku, Packing, Signature
from .flux1 import TIMESTEP, depth_of, linears

MODULATED = 256  # widest vector that the modulation layers read
STEP = 256  # the MLP's width is a multiple of this
PADDING = 32  # the host pads the number of tokens to a multiple of this, with a token of the file

LINEAR = Layer(bias=False)
LINEARS = {name: LINEAR for name in ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}
MODULATED_LINEARS = {**LINEARS, "adaLN_modulation.0": Layer(Packing.W4A16)}  # its input has one token per image
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
CONTEXT, NOISE, MAIN = "context_refiner", "noise_refiner", "layers"


def blocks(name, layers, after):
    """A list of blocks. The SwiGLU multiplies the outputs of w1, after a SiLU, and of w3; so w2's inputs have both signs."""
    return BlockList(name, MappingProxyType(layers), ("x",), after=after, shares_input=(("feed_forward.w1", "feed_forward.w3"),))


def measure(shapes, usual):
    dim, width = shapes["x_embedder.weight"]
    return {"in_channels": width // usual["patch_size"] ** 2, "dim": dim, "n_layers": depth_of(shapes, MAIN),
            "n_refiner_layers": depth_of(shapes, NOISE), "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
            "pad_tokens_multiple": PADDING if "cap_pad_token" in shapes else None}


def trouble(config):
    axes, dim = config["axes_dims"], config["dim"]
    if any(axis % 2 for axis in axes):
        return f"has axes_dims = {axes} in its configuration, but each of these numbers must be even"
    if dim % sum(axes):
        return f"has axes_dims = {axes} in its configuration, whose sum does not divide the width {dim}"
    return None


def heads(config):
    count = config["dim"] // sum(config["axes_dims"])
    return {"n_heads": count, "n_kv_heads": count}


def tensors(config):
    dim, wide, narrow = config["dim"], min(config["dim"], 1024), min(config["dim"], MODULATED)
    mlp, head = -(-int(config["ffn_dim_multiplier"] * dim) // STEP) * STEP, dim // config["n_heads"]
    pixels = config["in_channels"] * config["patch_size"] ** 2
    shapes = {"x_embedder": (dim, pixels), "cap_embedder.1": (dim, config["cap_feat_dim"]), "t_embedder.mlp.0": (wide, TIMESTEP),
              "t_embedder.mlp.2": (MODULATED, wide), "final_layer.linear": (pixels, dim), "final_layer.adaLN_modulation.1": (dim, narrow)}
    others = {"cap_embedder.0.weight": (config["cap_feat_dim"],)}
    if config["pad_tokens_multiple"]:
        others |= {"x_pad_token": (1, dim), "cap_pad_token": (1, dim)}
    counts = {CONTEXT: config["n_refiner_layers"], NOISE: config["n_refiner_layers"], MAIN: config["n_layers"]}
    for block in (f"{name}.{i}" for name, count in counts.items() for i in range(count)):
        weights = {"attention.qkv": (3 * dim, dim), "attention.out": (dim, dim), "feed_forward.w1": (mlp, dim),
                   "feed_forward.w2": (dim, mlp), "feed_forward.w3": (mlp, dim)}
        others |= {f"{block}.{name}.weight": shape for name, shape in weights.items()}
        others |= {f"{block}.{norm}.weight": (dim,) for norm in NORMS} | {
            f"{block}.attention.{norm}.weight": (head,) for norm in ("q_norm", "k_norm")}
        if not block.startswith(CONTEXT):
            shapes[f"{block}.adaLN_modulation.0"] = (4 * dim, narrow)
    return linears(shapes) | others


LISTS = (CONTEXT, NOISE, MAIN)
FEED_FORWARD = "feed_forward.net.0.proj"  # Nunchaku's name of w3 and w1
NUNCHAKU_MODULES = {"attention.to_qkv": "attention.qkv", "attention.to_out.0": "attention.out", "feed_forward.net.2": "feed_forward.w2"}
# Files of the second version only, under diffusers' names. The modulation is in 16 bits, and so may the refiners be.
NUNCHAKU = Nunchaku(
    model_classes=("NunchakuZImageTransformer2DModel",),
    config=MappingProxyType({"t_scale": "time_scale", **{key: key for key in (
        "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim", "rope_theta", "axes_dims")}}),
    inputs=("all_x_embedder.2-1", "cap_embedder.1"),
    blocks=MappingProxyType({name: name for name in LISTS}),
    linears=MappingProxyType({name: {ours: (theirs,) for theirs, ours in NUNCHAKU_MODULES.items()} for name in LISTS}),
    stacked=MappingProxyType({name: {FEED_FORWARD: ("feed_forward.w3", "feed_forward.w1")} for name in LISTS}),
    dense=MappingProxyType({name: {
        "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
        **{theirs: (theirs,) for theirs in ("attention.to_out.0", "feed_forward.net.2", FEED_FORWARD)}} for name in (CONTEXT, NOISE)}),
    norms=MappingProxyType({name: {
        **{f"{norm}.weight": f"{norm}.weight" for norm in NORMS},
        "attention.q_norm.weight": "attention.norm_q.weight", "attention.k_norm.weight": "attention.norm_k.weight",
        **({f"adaLN_modulation.0.{leaf}": f"adaLN_modulation.0.{leaf}" for leaf in ("weight", "bias")} if name != CONTEXT else {}),
    } for name in LISTS}),
    outside=MappingProxyType({
        "x_embedder": "all_x_embedder.2-1", "cap_embedder.1": "cap_embedder.1", "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2", "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1"}),
    others=MappingProxyType({name: name for name in ("cap_embedder.0.weight", "x_pad_token", "cap_pad_token")}),
    modules_v2=MappingProxyType({name: {} for name in LISTS}),
)

FAMILY = Family(
    title="Z-Image",
    architecture="z-image",
    model_class="comfy.ldm.lumina.model.NextDiT",
    lacks=MappingProxyType({"clip_text_dim": "NewBie", "siglip_feat_dim": "Z-Image-Omni"}),
    # The refiners run side by side, on the text and on the image, and the main blocks on both.
    blocks=(blocks(CONTEXT, LINEARS, ()), blocks(NOISE, MODULATED_LINEARS, ()), blocks(MAIN, MODULATED_LINEARS, (CONTEXT, NOISE))),
    outer=MappingProxyType({}),
    signature=Signature(
        anchors=(f"{NOISE}.0.attention.k_norm.weight",),
        names=("x_embedder.weight", "cap_embedder.1.weight", f"{MAIN}.0.attention.qkv.weight"),
        lookalikes=((f"{MAIN}.0.adaLN_modulation.1.weight", "a Lumina 2 model"),
                    ("siglip_embedder.", "a Z-Image-Omni model"),
                    ("dec_net.cond_embed.", "a Z-Image model in pixel space"),
                    (f"{NOISE}.0.attention.norm_k.", "a Z-Image model under diffusers' names, which only Load Diffusion Model reads")),
        telltale="cap_embedder.1.weight"),
    configuration=Configuration(
        keys=("image_model", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "in_channels", "patch_size", "cap_feat_dim",
              "axes_dims", "axes_lens", "rope_theta", "ffn_dim_multiplier", "time_scale", "pad_tokens_multiple", "qk_norm",
              "z_image_modulation"),
        fixed=MappingProxyType({"image_model": "lumina2", "qk_norm": True, "z_image_modulation": True}),
        usual=MappingProxyType({"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
                                "ffn_dim_multiplier": 8 / 3, "time_scale": 1000.0, "patch_size": 2}),
        # The arguments' defaults in the host's class. It finds the others in files of the published width only.
        assumed=MappingProxyType({"n_refiner_layers": 2, "n_heads": 32, "n_kv_heads": None, "axes_dims": [16, 56, 56],
                                  "axes_lens": [1, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0, "time_scale": 1.0,
                                  "pad_tokens_multiple": None, "z_image_modulation": False}),
        matrices=("x_embedder.weight", "cap_embedder.1.weight"),
        vectors=(f"{NOISE}.0.attention.k_norm.weight",),
        # Newer hosts tell by this norm whether a model fits fp16.
        values=lambda config: (f"{MAIN}.{config['n_layers'] - 2}.ffn_norm1.weight",),
        measure=measure, derive=heads, trouble=trouble),
    tensors=tensors,
    unused=("norm_final.weight",),
    figures=lambda config: (f"{config['n_layers']} main blocks, {config['n_refiner_layers']} refiners of the text and "
                            f"{config['n_refiner_layers']} of the image, hidden size {config['dim']}, {config['in_channels']} channels in"),
    text_width="cap_feat_dim",
    pooled=None,
    encoders="Qwen3 4B, with CLIPLoader's type lumina2",
    clip_type="LUMINA2",
    tokens=(4096, 256, 4352),  # a 1024 x 1024 image, its text, both
    examples=(f"{MAIN}.29.*", "*.feed_forward.w2 = 128"),
    nunchaku=NUNCHAKU,
    fused="z_image_blocks",
)
