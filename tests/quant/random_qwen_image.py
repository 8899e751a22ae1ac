"""The tensors of a small Qwen-Image under the names of a file."""


def qwen_image_shapes(hidden=256, depth=2, context=128, marked=False, layered=False):
    """{name: shape}; marked: with the empty tensor of Qwen-Image-Edit-2511; layered: a Qwen-Image-Layered."""
    shapes = {"img_in": (hidden, 64), "txt_in": (hidden, context), "proj_out": (64, hidden), "norm_out.linear": (2 * hidden, hidden),
              "time_text_embed.timestep_embedder.linear_1": (hidden, 256), "time_text_embed.timestep_embedder.linear_2": (hidden, hidden)}
    found = {"txt_norm.weight": (context,)}
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
        shapes |= {f"{block}.attn.{name}": (hidden, hidden) for name in attention}
        for stream in ("img", "txt"):
            shapes |= {f"{block}.{stream}_mod.1": (6 * hidden, hidden), f"{block}.{stream}_mlp.net.0.proj": (4 * hidden, hidden),
                       f"{block}.{stream}_mlp.net.2": (hidden, 4 * hidden)}
        found |= {f"{block}.attn.{name}.weight": (128,) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    found |= {f"{name}.weight": shape for name, shape in shapes.items()} | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    found |= {"__index_timestep_zero__": (0,)} if marked else {}
    return found | ({"time_text_embed.addition_t_embedding.weight": (2, hidden)} if layered else {})
