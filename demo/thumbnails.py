"""Draw the pictures that stand beside the templates in ComfyUI's list, with the templates themselves and the tiny FLUX.

    python demo/host/setup.py demo/thumbnails.py

Each picture is a template's own output: its graph runs in a real ComfyUI, with small files under the names of its models. Text encoders
are replaced by the demo's words, sizes by the tiny FLUX's 192 pixels. Fill is the tiny FLUX with input channels for the mask whose
weights are zero, so what it leaves alone is kept by the sampler. The LoRAs are exact: each makes the model read one word as another.
Kontext is the tiny FLUX itself, which was not trained for it: beside a picture's tokens it draws that picture again, in a colour between
the picture's and the caption's. There is no tiny model that follows edges, so Canny's and ControlNet's pictures show the edges that their
graphs find. redux_schematic.py and layer_maps.py draw the pictures of templates for which there is no tiny model.
"""

import io
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from host import setup, workflow
from host.client import Client
from host.server import TINY, Server
from tiny_flux import words

WORKFLOWS = setup.ROOT / "workflows"
SIDE, SHOWN, STEPS = 192, 320, 20  # pixels of a picture, and in the thumbnail; sampler steps
DEV, FILL = "svdq-int4_r32-flux.1-dev.safetensors", "svdq-int4_r32-flux.1-fill-dev.safetensors"
KONTEXT = "svdq-int4_r32-flux.1-kontext-dev.safetensors"
LORAS = {"realism_lora_comfy_converted.safetensors": ("star", "heart", 0.8),  # word, what it becomes, the template's strength
         "art_lora_comfy_converted.safetensors": ("blue", "yellow", 0.5),
         "anime_lora_comfy_converted.safetensors": ("white", "navy", 1.0)}
# {template: (caption of the first picture, caption of the second, seed) for each row}
ROWS = {
    "SVDQuant_FLUX1-Fill_inpaint": (
        ("small red circle left of large blue star on white", "small red circle left of large yellow heart on white", 42),
        ("large green ring above medium black circle on mint", "large green ring above medium purple diamond on mint", 7)),
    "SVDQuant_FLUX1-Kontext_edit": (
        ("small red circle left of large blue star on white", "small red circle left of large yellow star on white", 42),
        ("large blue star above small green square on white", "large yellow star above small green square on white", 3)),
    "SVDQuant_LoRA_stack": (
        ("small red circle left of large blue star on white", None, 42),
        ("large blue star above small green square on white", None, 3)),
    "SVDQuant_FLUX1-Canny_control": (("small red circle left of large blue star on white", None, 42),
                                     ("large green ring above medium black circle on mint", None, 7)),
    "SVDQuant_FLUX1_ControlNet": (("large green ring above medium black circle on mint", None, 7),
                                  ("small red circle left of large blue star on white", None, 42)),
}
FIND_EDGES = ("SVDQuant_FLUX1-Canny_control", "SVDQuant_FLUX1_ControlNet")
MASKED = ("SVDQuant_FLUX1-Fill_inpaint",)
MASKS = {42: (0.38, 0.12, 1, 1), 7: (0, 0.55, 1, 1)}  # {seed: the part that Fill redraws, left, top, right, bottom}


def template(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def prompt_of(name: str, client: Client, caption: str, seed: int) -> dict:
    """A template's prompt at the tiny FLUX's size, with the demo's words in place of text encoders."""
    prompt = workflow.to_prompt(template(name), client.object_info())
    encoders = {number for number, node in prompt.items() if node["class_type"] == "CLIPTextEncode"}
    for number, node in list(prompt.items()):
        if node["class_type"] == "DualCLIPLoader":
            del prompt[number]
        elif number in encoders:
            node.update(class_type="SVDQuantDemoWords", inputs={"text": caption})
        elif node["class_type"] == "FluxKontextImageScale":  # to a megapixel
            scale = {"upscale_method": "lanczos", "largest_size": SIDE}
            node.update(class_type="ImageScaleToMaxDimension", inputs={**node["inputs"], **scale})
        values = {"steps": STEPS, "width": SIDE, "height": SIDE, "seed": seed}
        node["inputs"].update({key: value for key, value in values.items() if key in node["inputs"]})
        node["inputs"].update({key: [value[0], 1] for key, value in node["inputs"].items()
                               if isinstance(value, list) and value[0] in encoders})
    return prompt


def up_to(class_type: str, prompt: dict) -> dict:
    """The part of a prompt that its nodes of a class need."""
    needed = [number for number, node in prompt.items() if node["class_type"] == class_type]
    for number in needed:
        needed += [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list) and value[0] not in needed]
    return {number: prompt[number] for number in needed}


def picture(client: Client, prompt: dict) -> Image.Image:
    """The picture that a prompt saves or previews."""
    outputs = client.post(prompt)
    [image] = [image for output in outputs.values() for image in output.get("images", []) if image["type"] != "input"]
    return Image.open(io.BytesIO(client.picture(image))).convert("RGB")


def quantize(client: Client, source: str, name: str) -> None:
    """Make the 4-bit file `name` of a 16-bit one, without calibration."""
    client.post({
        "1": {"class_type": "SVDQuantLoadModel", "inputs": {"model_name": source, "compute_dtype": "auto"}},
        "2": {"class_type": "SVDQuantQuantizeModel",
              "inputs": {"model": ["1", 0], "steps": 1, "seed": 0, "rank": 32, "preset": "data-free"}},
        "3": {"class_type": "SVDQuantSaveModel",
              "inputs": {"model": ["2", 0], "filename": name, "overwrite": True, "layout": "nunchaku"}},
    })


def lora(state: dict, word: str, other: str, strength: float) -> dict:
    """A LoRA of rank 1 on each of the two layers that read words; at `strength` the model reads `word` as `other`."""
    at, to = words.INDEX[word], words.INDEX[other]
    found = {}
    for name in ("txt_in", "vector_in.in_layer"):
        weight = state[f"{name}.weight"].float()
        found[f"diffusion_model.{name}.lora_A.weight"] = torch.nn.functional.one_hot(torch.tensor([at]), weight.shape[1]).float()
        found[f"diffusion_model.{name}.lora_B.weight"] = ((weight[:, to] - weight[:, at]) / strength)[:, None].contiguous()
    return found


def make_models(client: Client, folder: Path) -> None:
    """Put small files under the templates' names into a server's folder of models."""
    tiny = folder / "diffusion_models" / TINY["diffusion_models"]
    state = load_file(tiny)
    wide = torch.nn.functional.pad(state["img_in.weight"], (0, 4 * (96 - 16)))
    save_file({**state, "img_in.weight": wide}, folder / "diffusion_models" / "tiny_fill.safetensors")
    (folder / "vae" / "ae.safetensors").write_bytes((folder / "vae" / TINY["vae"]).read_bytes())
    (folder / "loras").mkdir(exist_ok=True)
    for name, change in LORAS.items():
        save_file(lora(state, *change), folder / "loras" / name)
    quantize(client, tiny.name, DEV)
    (tiny.parent / KONTEXT).write_bytes((tiny.parent / DEV).read_bytes())
    quantize(client, "tiny_fill.safetensors", FILL)


def masked(first: Image.Image, seed: int) -> Image.Image:
    """The picture with its mask as ComfyUI's MaskEditor saves it: transparent where Fill may draw."""
    left, top, right, bottom = (round(SIDE * part) for part in MASKS[seed])
    alpha = Image.new("L", first.size, 255)
    alpha.paste(0, (left, top, right, bottom))
    return Image.merge("RGBA", (*first.split(), alpha))


def row(name: str, client: Client, inputs: Path, caption: str, other: str | None, seed: int) -> tuple[Image.Image, Image.Image]:
    """The picture that FLUX.1-dev's template draws of a caption, and the template's own beside it."""
    plain = prompt_of("SVDQuant_FLUX1-dev_text_to_image", client, caption, seed)
    first = picture(client, plain)
    prompt = prompt_of(name, client, other or caption, seed)
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            shown = masked(first, seed) if name in MASKED else first
            if name in FIND_EDGES:
                shown = first.resize((2 * SHOWN, 2 * SHOWN), Image.Resampling.LANCZOS)
            shown.save(inputs / f"{name}_{seed}.png")
            node["inputs"]["image"] = f"{name}_{seed}.png"
    return first, picture(client, up_to("PreviewImage" if name in FIND_EDGES else "SaveImage", prompt))


def compose(rows: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Rows of two pictures as one square."""
    sheet = Image.new("RGB", (2 * SHOWN, len(rows) * SHOWN))
    for y, pair in enumerate(rows):
        for x, shown in enumerate(pair):
            sheet.paste(shown.resize((SHOWN, SHOWN), Image.Resampling.LANCZOS), (x * SHOWN, y * SHOWN))
    return sheet


def draw(client: Client, base: Path, out: Path) -> None:
    """Draw the thumbnails of ROWS with the server in a base folder."""
    make_models(client, base / "models")
    for name, rows in ROWS.items():
        compose([row(name, client, base / "input", *given) for given in rows]).save(out / f"{name}.jpg", quality=90)
        print(out / f"{name}.jpg", flush=True)


if __name__ == "__main__":
    with Server(setup.locate(), setup.STATE / "thumbnails") as server:
        draw(server.client, server.base, WORKFLOWS)
    sys.exit()
