"""Random FLUX.1 weights under the names of a file, for tests of any width and depth."""

import torch

from tiny_flux import words


def flux_shapes(hidden=256, depth=1, depth_single=2, in_channels=16, context=words.CONTEXT_DIM, pooled=words.POOLED_DIM, guidance=True):
    """{name: shape} of a FLUX.1's tensors."""
    shapes = {"img_in": (hidden, in_channels * 4), "txt_in": (hidden, context), "final_layer.linear": (64, hidden),
              "final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    for embedder, width in (("time_in", 256), ("vector_in", pooled), *((("guidance_in", 256),) if guidance else ())):
        shapes |= {f"{embedder}.in_layer": (hidden, width), f"{embedder}.out_layer": (hidden, hidden)}
    norms = []
    for i in range(depth):
        for block in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes |= {f"{block}_mod.lin": (6 * hidden, hidden), f"{block}_attn.qkv": (3 * hidden, hidden),
                       f"{block}_attn.proj": (hidden, hidden), f"{block}_mlp.0": (4 * hidden, hidden),
                       f"{block}_mlp.2": (hidden, 4 * hidden)}
            norms.append(f"{block}_attn.norm")
    for i in range(depth_single):
        block = f"single_blocks.{i}"
        shapes |= {f"{block}.linear1": (7 * hidden, hidden), f"{block}.linear2": (hidden, 5 * hidden),
                   f"{block}.modulation.lin": (3 * hidden, hidden)}
        norms.append(f"{block}.norm")
    found = {f"{norm}.{qk}_norm.scale": (128,) for norm in norms for qk in ("query", "key")}
    for name, shape in shapes.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def flux_tensors(dtype=torch.bfloat16, **changes):
    """{name: tensor} of a random FLUX.1 whose activations stay at order one; changes: as in flux_shapes."""
    g = torch.Generator().manual_seed(0)

    def tensor(name, shape):
        if name.endswith("_norm.scale"):
            return torch.ones(shape)
        values = torch.randn(shape, generator=g)
        return values / shape[1] ** 0.5 if len(shape) == 2 else values * 0.02

    return {name: tensor(name, shape).to(dtype) for name, shape in flux_shapes(**changes).items()}
