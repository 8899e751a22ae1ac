"""Draw the pictures of the quantizing templates: which layers of the model become 4 bits, and the sizes of its file before and after.

    python demo/host/setup.py demo/layer_maps.py

No model runs. Everything in a picture follows from the family's declaration and the published model's configuration: a row is a kind of
layer, a column a block, and the sizes are the sums of the tensors' bytes in bf16, and as SVDQuant Save Model stores them.
"""

import io
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from host.pack import load_pack

ROOT = Path(__file__).resolve().parents[1]
SIDE, DPI, RANK, BRANCH_BITS = 640, 100, 64, 8  # pixels of the picture, pixels per inch, the branches of the templates
LEFT, RIGHT, TOP, FOOT = 168, 24, 150, 74  # pixels around the map
BACKGROUND, TEXT, DIM = "#202024", "#f2f2f2", "#b4b4bc"  # those of the quantizer's chart
COLOURS = {"W4A4": "#26a08c", "W4A16": "#f0d65a"}
MEANINGS = {"W4A4": "4-bit weights and activations", "W4A16": "4-bit weights"}
FLUX_BLOCKS = {"num_heads": 24, "hidden_size": 3072, "patch_size": 2, "mlp_ratio": 4.0, "in_channels": 64, "out_channels": 64}


@dataclass(frozen=True)
class Model:
    """A published model. image_model: the name of its family at the host; config: what its tensors' shapes follow from."""

    title: str
    image_model: str
    config: dict


MODELS = {
    "SVDQuant_quantize_FLUX1": Model("FLUX.1 dev", "flux", FLUX_BLOCKS | {
        "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096, "vec_in_dim": 768, "guidance_embed": True}),
    "SVDQuant_quantize_Chroma": Model("Chroma1 HD", "chroma", FLUX_BLOCKS | {
        "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}),
    "SVDQuant_quantize_FLUX2": Model("FLUX.2 klein 4B", "flux2", FLUX_BLOCKS | {
        "depth": 5, "depth_single_blocks": 20, "context_in_dim": 7680, "in_channels": 128, "out_channels": 128, "mlp_ratio": 3.0,
        "patch_size": 1, "guidance_embed": False}),
    "SVDQuant_quantize_Qwen-Image": Model("Qwen-Image", "qwen_image", {
        "num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584, "in_channels": 64,
        "out_channels": 16, "use_additional_t_cond": False, "default_ref_method": "index"}),
    "SVDQuant_quantize_Z-Image": Model("Z-Image Turbo", "lumina2", {
        "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "cap_feat_dim": 2560, "in_channels": 16, "patch_size": 2,
        "ffn_dim_multiplier": 8 / 3, "pad_tokens_multiple": 32}),
}


@dataclass(frozen=True)
class Packed:
    """A Model's layers in 4 bits {name: "W4A4" or "W4A16"}, the bytes of its file in bf16, and those of the 4-bit file's tensors."""

    layers: dict
    bytes_before: int
    bytes_after: int


def packed(model: Model, rank: int = RANK, branch_bits: int = BRANCH_BITS) -> Packed:
    from comfyui_svdquant.quant import families
    from comfyui_svdquant.quant.layers import layout

    family = families.of_image_model(model.image_model)
    shapes = family.tensors(model.config)
    specs = {}
    for name in family.packed_names(shapes):
        layer = family.layer(name)
        specs[name] = layout.layer_spec(layer, name, shapes[f"{name}.weight"], rank * layer.branches, layer.bias, torch.bfloat16,
                                        branch_bits)
    replaced = {f"{name}.{part}" for name in specs for part in ("weight", "bias")}
    kept = sum(prod(shape) for name, shape in shapes.items() if name not in replaced)
    # The quantizer chooses scales that fit 8 bits times a number a row.
    parts = [part for spec in specs.values() for part in spec.stored(int8_scale=spec.format != layout.AWQ).values()]
    size = torch.bfloat16.itemsize
    return Packed({name: family.layer(name).packing.name for name in specs}, size * sum(map(prod, shapes.values())),
                  size * kept + sum(prod(shape) * dtype.itemsize for shape, dtype in parts))


def place(name: str) -> tuple[str, tuple[str, int]] | None:
    """(kind of layer, (list of blocks, number in it)) of a layer's name; None outside the blocks."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name)
    return (found[3], (found[1], int(found[2]))) if found else None


def in_blocks(layers: dict) -> dict:
    """{place: "W4A4" or "W4A16"} of the layers within blocks."""
    return {place(name): kind for name, kind in layers.items() if place(name)}


def cells(places: dict) -> tuple[list[str], list[tuple[str, int]], np.ndarray]:
    """(kinds, blocks, RGB of each kind (row) in each block (column), the background's where a block has no such layer), from in_blocks."""
    from matplotlib.colors import to_rgb

    kinds, blocks = (list(dict.fromkeys(found[part] for found in places)) for part in (0, 1))
    grid = np.full((len(kinds), len(blocks), 3), to_rgb(BACKGROUND))
    for (kind, block), packing in places.items():
        grid[kinds.index(kind), blocks.index(block)] = to_rgb(COLOURS[packing])
    return kinds, blocks, grid


def draw(model: Model, shown: Packed) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = in_blocks(shown.layers)
    kinds, blocks, grid = cells(places)
    figure = Figure((SIDE / DPI, SIDE / DPI), dpi=DPI, facecolor=BACKGROUND)

    def write(x, y, text, color=TEXT, **style):
        figure.text(x / SIDE, 1 - y / SIDE, text, color=color, **style)

    write(24, 58, model.title, fontsize=27, fontweight="bold")
    write(24, 100, f"{shown.bytes_before / 1e9:.1f} GB  \N{RIGHTWARDS ARROW}  {shown.bytes_after / 1e9:.1f} GB", fontsize=21)
    axes = figure.add_axes((LEFT / SIDE, FOOT / SIDE, 1 - (LEFT + RIGHT) / SIDE, 1 - (TOP + FOOT) / SIDE), facecolor=BACKGROUND)
    axes.pcolormesh(np.arange(len(blocks) + 1), np.arange(len(kinds) + 1), grid, edgecolors=BACKGROUND, linewidth=1)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.set_xticks([])
    axes.tick_params(colors=DIM, labelsize=9.5, length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    for x, kind in ((24, "W4A4"), (340, "W4A16")):
        if kind in places.values():
            write(x, SIDE - 22, "\N{BLACK SQUARE}", COLOURS[kind], fontsize=17)
            write(x + 24, SIDE - 23, f"{kind}: {MEANINGS[kind]}", DIM, fontsize=10.5)
    write(LEFT, SIDE - FOOT + 22, f"{len(places)} layers in {len(blocks)} blocks", DIM, fontsize=10.5)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def jpeg(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return data.getvalue()


if __name__ == "__main__":
    load_pack()
    for template, model in MODELS.items():
        file = ROOT / "workflows" / f"{template}.jpg"
        file.write_bytes(jpeg(draw(model, packed(model))))
        print(file)
