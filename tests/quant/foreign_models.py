"""Headers of models other than FLUX.1, made by rule: the published names and shapes of the first block and of the layers around it."""

from comfyui_svdquant.quant.families import TITLES


def linear(name, n, k):
    return {f"{name}.weight": (n, k), f"{name}.bias": (n,)}


def linears(*entries):
    return {key: shape for entry in entries for key, shape in linear(*entry).items()}


def unet(width, context, label=None):
    """The header of a Stability AI UNet in a whole checkpoint."""
    prefix = "model.diffusion_model."
    block = f"{prefix}input_blocks.4.1.transformer_blocks.0"
    entries = {f"{prefix}input_blocks.0.0.weight": (width, 4, 3, 3), f"{prefix}input_blocks.0.0.bias": (width,),
               f"{prefix}input_blocks.1.0.in_layers.2.weight": (width, width, 3, 3), f"{block}.attn2.to_k.weight": (2 * width, context),
               f"{block}.attn1.to_q.weight": (2 * width, 2 * width), **linears((f"{prefix}time_embed.0", 4 * width, width)),
               **clip("cond_stage_model.transformer."), **vae(4, "first_stage_model.")}
    return entries | (linear(f"{prefix}label_emb.0.0", 4 * width, label) if label else {})


def clip(prefix="", width=768):
    layer = f"{prefix}text_model.encoder.layers.0"
    return {f"{prefix}text_model.embeddings.token_embedding.weight": (49408, width),
            **linears((f"{layer}.self_attn.q_proj", width, width), (f"{layer}.mlp.fc1", 4 * width, width))}


def t5(width=4096):
    block = "encoder.block.0.layer"
    return {"shared.weight": (32128, width), f"{block}.0.SelfAttention.q.weight": (width, width), f"{block}.0.layer_norm.weight": (width,),
            f"{block}.1.DenseReluDense.wi_0.weight": (10240, width)}


def vae(channels=16, prefix=""):
    return {f"{prefix}decoder.conv_in.weight": (512, channels, 3, 3), f"{prefix}encoder.conv_in.weight": (128, 3, 3, 3),
            f"{prefix}decoder.mid.attn_1.q.weight": (512, 512, 1, 1), f"{prefix}decoder.up.0.block.0.conv1.weight": (128, 256, 3, 3)}


def flux_block(width, modulation=True):
    """Around and in the first double and single block, in Black Forest Labs' naming."""
    entries = {"img_in.weight": (width, 64), "img_in.bias": (width,), "txt_in.weight": (width, 4096), "txt_in.bias": (width,)}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        entries |= linears((f"{block}_attn.qkv", 3 * width, width), (f"{block}_attn.proj", width, width),
                           (f"{block}_mlp.0", 4 * width, width), (f"{block}_mlp.2", width, 4 * width))
        entries |= {f"{block}_attn.norm.{kind}_norm.scale": (128,) for kind in ("query", "key")}
        entries |= linear(f"{block}_mod.lin", 6 * width, width) if modulation else {}
    return entries | linears(("single_blocks.0.linear1", 7 * width, width), ("single_blocks.0.linear2", width, 5 * width),
                             ("final_layer.linear", 64, width))


def diffusers_block(width):
    """The first joint block, as diffusers names it in FLUX.1 and its relatives."""
    block = "transformer_blocks.0"
    attention = linears(*((f"{block}.attn.{name}", width, width) for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj",
                                                                              "add_v_proj", "to_out.0", "to_add_out")))
    return attention | {f"{block}.attn.norm_{name}.weight": (128,) for name in ("q", "k", "added_q", "added_k")}


def lora(form, width=3072, rank=16):
    down, up = ("lora_down.weight", "lora_up.weight") if form == "kohya" else ("lora_A.weight", "lora_B.weight")
    layer = {"kohya": "lora_unet_double_blocks_0_img_attn_qkv", "diffusers": "transformer.transformer_blocks.0.attn.to_q",
             "FLUX tools": "double_blocks.0.img_attn.qkv"}[form]
    entries = {f"{layer}.{down}": (rank, width), f"{layer}.{up}": (3 * width, rank)}
    if form == "FLUX tools":  # Black Forest Labs' own hold norms and a wider img_in
        entries |= {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "img_in.lora_A.weight": (rank, 128),
                    "img_in.lora_B.weight": (width, rank), "img_in.lora_B.bias": (width,)}
    return entries


# {name in the message: the header's {tensor: shape}}.
FOREIGN = {
    "SD 1.5": ("a Stable Diffusion or SDXL UNet", unet(320, 768)),
    "SDXL": ("a Stable Diffusion or SDXL UNet", unet(320, 2048, 2816)),
    "SDXL, diffusers": ("a Stable Diffusion or SDXL UNet", {
        "conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        **linears(("time_embedding.linear_1", 1280, 320))}),
    "SD3": ("a Stable Diffusion 3 model", {
        "model.diffusion_model.pos_embed": (1, 36864, 1536), "model.diffusion_model.x_embedder.proj.weight": (1536, 16, 2, 2),
        **linears(("model.diffusion_model.context_embedder", 1536, 4096),
                  ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv", 4608, 1536),
                  ("model.diffusion_model.joint_blocks.0.context_block.attn.proj", 1536, 1536))}),
    "SD3.5, diffusers": (f"not a {TITLES} model", {"pos_embed.proj.weight": (2432, 16, 2, 2), **diffusers_block(2432),
                                              **linears(("context_embedder", 2432, 4096))}),
    "Chroma, a part": ("a Chroma model with parts missing, or under diffusers' names", flux_block(3072, False) | linears(
        ("distilled_guidance_layer.in_proj", 5120, 64), ("distilled_guidance_layer.layers.0.in_layer", 5120, 5120))),
    "Chroma, diffusers": ("a Chroma model with parts missing, or under diffusers' names", diffusers_block(3072) | linears(
        ("x_embedder", 3072, 64), ("context_embedder", 3072, 4096), ("proj_out", 64, 3072),
        ("distilled_guidance_layer.in_proj", 5120, 64))),
    "FLUX.2, a part": ("a FLUX.2 model with parts missing", {
        **{key: shape for key, shape in flux_block(6144, False).items() if not key.endswith("bias") and not key.startswith("img_in")},
        "txt_in.weight": (6144, 15360), "double_stream_modulation_img.lin.weight": (36864, 6144)}),
    "FLUX.2, diffusers": ("a FLUX.2 model under diffusers' names, which ComfyUI does not read", diffusers_block(6144) | {
        "x_embedder.weight": (6144, 128), "context_embedder.weight": (6144, 15360),
        "double_stream_modulation_img.linear.weight": (36864, 6144), "proj_out.weight": (128, 6144)}),
    "FLUX.1 ControlNet, diffusers": ("a ControlNet", diffusers_block(3072) | linears(
        ("x_embedder", 3072, 64), ("context_embedder", 3072, 4096), ("controlnet_x_embedder", 3072, 64),
        ("controlnet_blocks.0", 3072, 3072))),
    "Qwen-Image, a part": ("a Qwen-Image model with parts missing", diffusers_block(3072) | {"txt_norm.weight": (3584,)} | linears(
        ("img_in", 3072, 64), ("transformer_blocks.0.img_mlp.net.0.proj", 12288, 3072), ("proj_out", 64, 3072))),
    "HunyuanVideo": ("a HunyuanVideo model", {key: shape for key, shape in flux_block(3072).items() if not key.startswith("img_in")} | {
        "img_in.proj.weight": (3072, 16, 1, 2, 2), **linears(("txt_in.individual_token_refiner.blocks.0.self_attn.qkv", 9216, 3072))}),
    "HiDream": ("a HiDream model", {
        "caption_projection.0.linear.weight": (2560, 4096), "double_stream_blocks.0.block.ff_i.shared_experts.w1.weight": (3584, 2560),
        **linears(("x_embedder.proj", 2560, 64), ("double_stream_blocks.0.block.attn1.to_q", 2560, 2560))}),
    "Lumina": ("a Lumina 2 model", {
        "cap_embedder.0.weight": (2304,), **linears(
            ("cap_embedder.1", 2304, 2304), ("x_embedder", 2304, 64), ("layers.0.adaLN_modulation.1", 9216, 1024)),
        "layers.0.attention.qkv.weight": (3840, 2304), "noise_refiner.0.attention.qkv.weight": (3840, 2304)}),
    "Wan": (f"not a {TITLES} model", {"patch_embedding.weight": (5120, 16, 1, 2, 2), "head.modulation": (1, 2, 5120),
                                 **linears(("blocks.0.self_attn.q", 5120, 5120), ("blocks.0.cross_attn.k", 5120, 5120))}),
    "T5": ("a T5 text encoder", t5()), "CLIP": ("a CLIP text encoder", clip()), "VAE": ("a VAE", vae()),
    "VAE, diffusers": ("a VAE", vae() | {"encoder.down_blocks.0.resnets.0.conv1.weight": (128, 128, 3, 3)}),
    "LoRA, kohya": ("a LoRA", lora("kohya")), "LoRA, diffusers": ("a LoRA", lora("diffusers")),
    "LoRA, FLUX tools": ("a LoRA", lora("FLUX tools")),
}
