"""Qwen-Image by Alibaba: Qwen-Image, Qwen-Image-Edit and Qwen-Image-Layered, and their fine-tunes."""

from types import MappingProxyType

from .family import BlockList, Configuration, Family, Gelu, Layer, Nunchaku, Packing, Signature, all_unsigned
from .flux1 import TIMESTEP, depth_of, linears

BLOCKS = "transformer_blocks"
PIXELS = 4  # pixels of the latent in a token
ZERO_TIMESTEP = "__index_timestep_zero__"  # an empty tensor that marks Edit-2511's way to read reference images
ADDITION = "time_text_embed.addition_t_embedding.weight"  # only Layered has it
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

LINEAR = Layer()
MODULATION = Layer(Packing.W4A16)  # its input has one token per image
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def mlp_layers(mlp):
    """The layers of the MLP `mlp`, whose first part is a module with the first linear and the GELU in it."""
    gelu = Gelu(f"{mlp}.net.0", lambda k, n: 0, f"{mlp}.net.2", "comfy.ldm.qwen_image.model.GELU")
    return {f"{mlp}.net.0.proj": Layer(gelu=gelu), f"{mlp}.net.2": Layer(unsigned_from=all_unsigned)}


LAYERS = {"img_mod.1": MODULATION, "txt_mod.1": MODULATION, **dict.fromkeys((*QKV, *ADDED_QKV, "attn.to_out.0", "attn.to_add_out"), LINEAR),
          **mlp_layers("img_mlp"), **mlp_layers("txt_mlp")}


def measure(shapes, usual):
    hidden, head = shapes["img_in.weight"][0], shapes[f"{BLOCKS}.0.attn.norm_q.weight"][0]
    layered = ADDITION in shapes
    return {"in_channels": shapes["img_in.weight"][1], "out_channels": shapes["proj_out.weight"][0] // PIXELS,
            "num_layers": depth_of(shapes, BLOCKS), "num_attention_heads": hidden // head, "attention_head_dim": head,
            "joint_attention_dim": shapes["txt_in.weight"][1], "use_additional_t_cond": layered,
            "default_ref_method": "negative_index" if layered else "index_timestep_zero" if ZERO_TIMESTEP in shapes else "index"}


def trouble(config):
    axes, head = config["axes_dims_rope"], config["attention_head_dim"]
    if any(axis % 2 for axis in axes) or sum(axes) != head:
        return f"has axes_dims_rope = {axes} in its configuration, which must be even and add up to a head's {head} channels"
    return None


def tensors(config):
    head, wide = config["attention_head_dim"], config["joint_attention_dim"]
    hidden = config["num_attention_heads"] * head
    shapes = {"img_in": (hidden, config["in_channels"]), "txt_in": (hidden, wide), "norm_out.linear": (2 * hidden, hidden),
              "proj_out": (config["out_channels"] * PIXELS, hidden), "time_text_embed.timestep_embedder.linear_1": (hidden, TIMESTEP),
              "time_text_embed.timestep_embedder.linear_2": (hidden, hidden)}
    others = {"txt_norm.weight": (wide,)}
    for block in (f"{BLOCKS}.{i}" for i in range(config["num_layers"])):
        for stream in ("img", "txt"):
            shapes |= {f"{block}.{stream}_mod.1": (6 * hidden, hidden), f"{block}.{stream}_mlp.net.0.proj": (4 * hidden, hidden),
                       f"{block}.{stream}_mlp.net.2": (hidden, 4 * hidden)}
        shapes |= {f"{block}.{name}": (hidden, hidden) for name in (*QKV, *ADDED_QKV, "attn.to_out.0", "attn.to_add_out")}
        others |= {f"{block}.attn.{norm}.weight": (head,) for norm in NORMS}
    if config["use_additional_t_cond"]:
        others[ADDITION] = (2, hidden)
    if config["default_ref_method"] == "index_timestep_zero":
        others[ZERO_TIMESTEP] = (0,)
    return linears(shapes) | others


def figures(config):
    return (f"{config['num_layers']} blocks, hidden size {config['num_attention_heads'] * config['attention_head_dim']}, "
            f"{config['in_channels'] // PIXELS} channels in")


# Files of the second version only. q, k and v are one layer there, with one smoothing factor and one branch. All other names are ours.
SINGLE_LINEARS = ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
NUNCHAKU = Nunchaku(
    model_classes=("NunchakuQwenImageTransformer2DModel",),
    config=MappingProxyType({key: key for key in ("in_channels", "out_channels", "num_layers", "num_attention_heads",
                                                  "attention_head_dim", "joint_attention_dim", "axes_dims_rope")}),
    inputs=("img_in", "txt_in", "txt_norm"),
    blocks=MappingProxyType({BLOCKS: BLOCKS}),
    linears=MappingProxyType({BLOCKS: {name: (name,) for name in SINGLE_LINEARS}}),
    stacked=MappingProxyType({BLOCKS: {"attn.to_qkv": QKV, "attn.add_qkv_proj": ADDED_QKV}}),
    modulations=MappingProxyType({BLOCKS: {name: name for name in ("img_mod.1", "txt_mod.1")}}),
    chunks=MappingProxyType({BLOCKS: 6}),  # shift, scale and gate, twice
    norms=MappingProxyType({BLOCKS: {f"attn.{norm}.weight": f"attn.{norm}.weight" for norm in NORMS}}),
    outside=MappingProxyType({name: name for name in (
        "img_in", "txt_in", "norm_out.linear", "proj_out", "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2")}),
    others=MappingProxyType({"txt_norm.weight": "txt_norm.weight"}),
    markers=MappingProxyType({"zero_cond_t": ZERO_TIMESTEP}),
    modules_v2=MappingProxyType({BLOCKS: {}}),
)

FAMILY = Family(
    title="Qwen-Image",
    architecture="qwen-image",
    model_class="comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
    # A block returns the text first.
    blocks=(BlockList(BLOCKS, MappingProxyType(LAYERS), ("hidden_states", "encoder_hidden_states"),
                      returned=("encoder_hidden_states", "hidden_states"), shares_input=(QKV, ADDED_QKV)),),
    outer=MappingProxyType(dict.fromkeys(("norm_out.linear", "time_text_embed.timestep_embedder.linear_2"), MODULATION)),
    signature=Signature(
        anchors=("txt_norm.weight",),
        names=("img_in.weight", "txt_in.weight", f"{BLOCKS}.0.attn.add_q_proj.weight", f"{BLOCKS}.0.attn.norm_q.weight"),
        lookalikes=(("controlnet_blocks.0.weight", "a ControlNet"),),
        telltale="txt_norm.weight"),
    configuration=Configuration(
        keys=("image_model", "in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim",
              "joint_attention_dim", "axes_dims_rope", "default_ref_method", "use_additional_t_cond"),
        fixed=MappingProxyType({"image_model": "qwen_image"}),
        usual=MappingProxyType({"axes_dims_rope": [16, 56, 56]}),
        assumed=MappingProxyType({"out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584,
                                  "axes_dims_rope": [16, 56, 56], "default_ref_method": "index", "use_additional_t_cond": False}),
        detected=("default_ref_method", "use_additional_t_cond"),
        matrices=("img_in.weight", "txt_in.weight", "proj_out.weight"),
        vectors=(f"{BLOCKS}.0.attn.norm_q.weight",),
        measure=measure, derive=lambda config: {}, trouble=trouble),
    tensors=tensors,
    figures=figures,
    variants=lambda config: {"index_timestep_zero": "Qwen-Image-Edit-2511", "negative_index": "Qwen-Image-Layered"}.get(
        config["default_ref_method"]),
    text_width="joint_attention_dim",
    pooled=None,
    encoders="Qwen2.5-VL 7B, with CLIPLoader's type qwen_image",
    clip_type="QWEN_IMAGE",
    tokens=(4096, 256, 4352),  # a 1024 x 1024 image, its text, both
    examples=(f"{BLOCKS}.59.*", "*.net.2 = 128"),
    nunchaku=NUNCHAKU,
    fused="qwen_blocks",
)
