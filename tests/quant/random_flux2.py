"""The tensors of a small FLUX.2 under the names of a file."""

MODULATIONS = {"double_stream_modulation_img.lin": 6, "double_stream_modulation_txt.lin": 6, "single_stream_modulation.lin": 3,
               "final_layer.adaLN_modulation.1": 2}


def flux2_shapes(hidden=256, depth=1, depth_single=2, context=128, guidance=True):
    """{name: shape}; without guidance it is a klein."""
    shapes = {"img_in": (hidden, 128), "txt_in": (hidden, context), "final_layer.linear": (128, hidden)}
    shapes |= {name: (chunks * hidden, hidden) for name, chunks in MODULATIONS.items()}
    for embedder in ("time_in", *(("guidance_in",) if guidance else ())):
        shapes |= {f"{embedder}.in_layer": (hidden, 256), f"{embedder}.out_layer": (hidden, hidden)}
    norms = []
    for i in range(depth):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes |= {f"{stream}_attn.qkv": (3 * hidden, hidden), f"{stream}_attn.proj": (hidden, hidden),
                       f"{stream}_mlp.0": (6 * hidden, hidden), f"{stream}_mlp.2": (hidden, 3 * hidden)}
            norms.append(f"{stream}_attn.norm")
    for i in range(depth_single):
        shapes |= {f"single_blocks.{i}.linear1": (9 * hidden, hidden), f"single_blocks.{i}.linear2": (hidden, 4 * hidden)}
        norms.append(f"single_blocks.{i}.norm")
    return {f"{name}.weight": shape for name, shape in shapes.items()} | {
        f"{norm}.{part}_norm.scale": (128,) for norm in norms for part in ("query", "key")}
