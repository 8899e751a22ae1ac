"""The tensors of a small Z-Image under the names of a file."""


def z_image_shapes(hidden=256, depth=2, refiners=2, context=128, pad_tokens=True, unused=False):
    """{name: shape}; unused: with the norm that Lumina 2 has and no forward reads."""
    mlp = -(-hidden * 8 // 3 // 256) * 256
    shapes = {"x_embedder": (hidden, 64), "cap_embedder.1": (hidden, context), "t_embedder.mlp.0": (hidden, 256),
              "t_embedder.mlp.2": (256, hidden), "final_layer.linear": (64, hidden), "final_layer.adaLN_modulation.1": (hidden, 256)}
    found = {"cap_embedder.0.weight": (context,)}
    found |= {"x_pad_token": (1, hidden), "cap_pad_token": (1, hidden)} if pad_tokens else {}
    for kind, count in (("context_refiner", refiners), ("noise_refiner", refiners), ("layers", depth)):
        for block in (f"{kind}.{i}" for i in range(count)):
            found |= {f"{block}.attention.qkv.weight": (3 * hidden, hidden), f"{block}.attention.out.weight": (hidden, hidden),
                      f"{block}.feed_forward.w1.weight": (mlp, hidden), f"{block}.feed_forward.w3.weight": (mlp, hidden),
                      f"{block}.feed_forward.w2.weight": (hidden, mlp)}
            found |= {f"{block}.{norm}.weight": (hidden,) for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")}
            found |= {f"{block}.attention.{norm}.weight": (128,) for norm in ("q_norm", "k_norm")}
            shapes |= {f"{block}.adaLN_modulation.0": (4 * hidden, 256)} if kind != "context_refiner" else {}
    found |= {f"{name}.weight": shape for name, shape in shapes.items()} | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    return found | ({"norm_final.weight": (hidden,)} if unused else {})
