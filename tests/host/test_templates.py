"""The users' templates: their entries in the list, their fit with the server's nodes, and their runs."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from host import workflow
from host.server import PACK, TINY, Server

from ..quant.random_chroma import chroma_tensors
from ..quant.random_flux import flux_tensors
from ..quant.random_flux2 import flux2_shapes
from ..quant.random_models import random_tensors
from ..quant.random_qwen_image import qwen_image_shapes
from ..quant.random_z_image import z_image_shapes
from . import layout

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
GRAPHS = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
CAPTIONS = "small red circle left of large blue star on white\nlarge yellow moon above small green square on navy"
DEMO = json.loads((ROOT / "demo" / "custom_node" / "workflows" / "SVDQuant_demo.json").read_text(encoding="utf-8"))
SIDE = 64  # pixels per side of the tests' pictures

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def object_info(server: Server) -> dict:
    """The server's nodes, with the picture that comes with ComfyUI among their choices."""
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(server.base / "input" / "example.png")
    return server.client.object_info()


@pytest.fixture(params=NAMES)
def graph(request: pytest.FixtureRequest) -> dict:
    return GRAPHS[request.param]


@pytest.fixture(params=[*GRAPHS.values(), DEMO], ids=[*NAMES, "SVDQuant_demo"])
def drawn(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_the_server_lists_and_serves_it(server, name):
    assert name in server.client.get("/workflow_templates")[PACK]
    assert server.client.get(f"/api/workflow_templates/{PACK}/{name}.json") == GRAPHS[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_server_serves_its_thumbnail(server, name):
    thumbnail = server.client.fetch(f"/api/workflow_templates/{PACK}/{name}.jpg")
    assert Image.open(io.BytesIO(thumbnail)).format == "JPEG"
    assert len(thumbnail) < 100_000


@pytest.mark.parametrize("name", NAMES)
def test_its_name_works_in_a_link_and_is_found(name):
    assert re.fullmatch("[A-Za-z0-9_-]+", name), "the page ignores ?template= with any other character"
    assert "svdquant" in name.lower(), "the page searches the templates by name"


def test_it_fits_the_servers_nodes(graph, object_info):
    assert workflow.problems(workflow.to_prompt(graph, object_info), object_info) == []


def test_no_node_has_a_widget_value_too_many(graph, object_info):
    for node in graph["nodes"]:
        if node["type"] in object_info:
            widgets = [(name, kind, options) for name, (kind, options) in workflow.specs(object_info[node["type"]]).items()
                       if kind in workflow.WIDGETS and not options.get("forceInput")]
            expected = len(widgets) + sum(workflow.has_page_widget(*widget) for widget in widgets)
            assert len(node["widgets_values"]) == expected, node["type"]


def test_links_and_nodes_agree(drawn):
    nodes = {node["id"]: node for node in drawn["nodes"]}
    for number, source, out_slot, target, in_slot, kind in drawn["links"]:
        assert number in nodes[source]["outputs"][out_slot]["links"]
        assert nodes[target]["inputs"][in_slot]["link"] == number
        assert nodes[source]["outputs"][out_slot]["type"] == kind
    assert sum(len(out["links"]) for node in nodes.values() for out in node["outputs"]) == len(drawn["links"])
    assert len(nodes) == drawn["last_node_id"] and len(drawn["links"]) == drawn["last_link_id"]


def test_every_node_names_its_pack(graph):
    for node in graph["nodes"]:
        if not layout.is_drawn_by_the_page(node):
            pack = "svdquant" if node["type"].startswith("SVDQuant") else "comfy-core"
            assert node["properties"]["cnr_id"] == pack
            assert node["properties"]["ver"]
            assert node["properties"]["Node name for S&R"] == node["type"]


def model_files(graph: dict) -> dict:
    """{name of a model file that a node chooses: its download entry, or None}."""
    found = {}
    for node in graph["nodes"]:
        entries = {entry["name"]: entry for entry in node["properties"].get("models", [])}
        names = [value for value in node.get("widgets_values", []) if workflow.is_model_file(value)]
        assert entries.keys() <= set(names), f"{node['type']} ({node['id']}) offers a file that it does not choose"
        found |= {name: entries.get(name) for name in names}
    return found


def test_every_model_file_has_a_download(graph, server):
    folders = {folder["name"] for folder in server.client.get("/experiment/models")}
    for name, entry in model_files(graph).items():
        assert entry, f"{name} has no entry in properties.models"
        assert entry["directory"] in folders
        assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+", entry["url"])
        assert entry["url"].endswith("/" + name)
        assert entry.keys() <= {"name", "url", "directory", "hash", "hash_type"}
        if "hash" in entry:
            assert entry["hash_type"] == "SHA256" and re.fullmatch("[0-9a-f]{64}", entry["hash"])


def test_the_note_links_every_file_and_shows_its_place(graph):
    text = next(node for node in graph["nodes"] if node.get("title") == "Model files")["widgets_values"][0]
    files = model_files(graph)
    assert dict(re.findall(r"\[(\S+)\]\((\S+)\)", text)) == {name: entry["url"] for name, entry in files.items()}
    folder, shown = None, {}
    for line in text.split("```")[1].splitlines()[2:]:
        leaf = line.rpartition("── ")[2]
        if leaf.endswith("/"):
            folder = leaf.rstrip("/")
        else:
            shown[leaf] = folder
    assert shown == {name: entry["directory"] for name, entry in files.items()}


def test_a_name_in_a_note_is_a_template_of_ours(graph):
    for node in graph["nodes"]:
        if layout.is_note(node):
            assert set(re.findall(r"SVDQuant_[\w-]+", node["widgets_values"][0])) <= set(NAMES)


def test_nothing_overlaps_and_no_node_sticks_out_of_a_group(drawn, object_info):
    boxes = [(node.get("title", node["type"]), layout.box(node, object_info)) for node in drawn["nodes"]]
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if layout.overlap(one, other)] == []
    groups = [(group["title"], layout.group_box(group)) for group in drawn["groups"]]
    assert [(a, b) for (a, one), (b, other) in combinations(groups, 2) if layout.overlap(one, other)] == []
    for name, node in boxes:
        for title, group in groups:
            assert layout.within(node, group) or not layout.overlap(node, group), f"{name} sticks out of {title}"


def test_every_step_is_in_a_group(drawn, object_info):
    for node in drawn["nodes"]:
        homes = [group["title"] for group in drawn["groups"] if layout.overlap(layout.box(node, object_info), layout.group_box(group))]
        assert len(homes) == (not layout.is_note(node)), node.get("title", node["type"])


def test_steps_are_read_from_left_to_right(drawn):
    """By their groups' left edges; steps in one column from top to bottom."""
    places = [tuple(group["bounding"][:2]) for group in drawn["groups"]]
    assert places == sorted(places)
    assert [group["title"].partition(".")[0] for group in drawn["groups"]] == [str(i + 1) for i in range(len(places))]


@pytest.mark.parametrize("renderer", layout.RENDERERS, ids=lambda renderer: renderer.name)
def test_no_link_runs_behind_a_node(drawn, object_info, renderer):
    assert layout.hidden_links(drawn, object_info, renderer) == []


def test_a_link_behind_a_node_is_found(object_info):
    """A VAE loader and a decoder with a note between them, which the link crosses or passes."""
    graph = {"nodes": [
        {"id": 1, "type": "VAELoader", "pos": [0, 0], "size": [300, 110], "properties": {}},
        {"id": 2, "type": "Note", "pos": [400, 0], "size": [100, 100], "properties": {}},
        {"id": 3, "type": "VAEDecode", "pos": [600, 0], "size": [225, 74], "properties": {}},
    ], "links": [[1, 1, 0, 3, 1, "VAE"]]}
    for renderer in layout.RENDERERS:
        assert layout.hidden_links(graph, object_info, renderer) == ["VAE VAELoader (1) -> VAEDecode (3) runs behind Note (2)"]
        level = renderer.first_slot + layout.SLOT_PITCH // 2  # the link's height halfway, where the note is
        graph["nodes"][1]["pos"] = [400, level + layout.TITLE + layout.CLEARANCE + 10]
        assert layout.hidden_links(graph, object_info, renderer) == []
        graph["nodes"][1]["pos"] = [400, level + layout.TITLE - 10]
        assert len(layout.hidden_links(graph, object_info, renderer)) == 1, "it runs behind the note's title"
        graph["nodes"][1]["pos"] = [400, level + layout.TITLE + 10]
        assert len(layout.hidden_links(graph, object_info, renderer)) == 1, "it almost touches the note's title"
        graph["nodes"][2]["pos"] = [0, 300]
        assert len(layout.hidden_links(graph, object_info, renderer)) == 2, "a link that returns runs behind both its nodes"
        graph["nodes"][1]["pos"], graph["nodes"][2]["pos"] = [400, 0], [600, 0]


def test_it_opens_readable(drawn, object_info):
    """At the view that it stores, which newer pages take only with the mark that web/js/template_view.js looks for."""
    assert drawn["extra"]["svdquant_restore_view"] is True
    view = drawn["extra"]["ds"]
    assert view["scale"] >= 0.75, "ComfyUI 0.3.75 draws no text below about 0.6"
    note = next(node for node in drawn["nodes"] if node.get("title") == "What to do")
    for rectangle in (layout.box(note, object_info), layout.group_box(drawn["groups"][0])):
        assert layout.within(layout.on_screen(rectangle, view), layout.WINDOW)


def test_the_page_loads_the_script_that_looks_for_the_mark(server):
    [path] = (path for path in server.client.get("/extensions") if path.endswith("/template_view.js"))
    assert '"svdquant_restore_view"' in server.client.fetch(path).decode()


def test_a_node_that_shows_text_is_stored_with_room_for_it(drawn, object_info):
    for node in drawn["nodes"]:
        if node["type"] in layout.SHOWN_TEXT:
            least = layout.least_height({**node, "properties": {}}, object_info[node["type"]])  # the height if no file is missing
            assert node["size"][1] >= least, node.get("title", node["type"])


def shrunk(graph: dict, object_info: dict) -> dict:
    """The template's prompt for small stand-ins of its models: the tiny model's words node in place of text encoders, few steps, small
    pictures. Its files keep their names."""
    prompt = workflow.to_prompt(graph, object_info)
    encoders = {number for number, node in prompt.items() if node["class_type"] == "CLIPTextEncode"}
    for number, node in list(prompt.items()):
        inputs = node["inputs"]
        if node["class_type"] in ("DualCLIPLoader", "CLIPLoader"):
            del prompt[number]
        elif number in encoders:
            node.update(class_type="SVDQuantDemoWords", inputs={"text": CAPTIONS.splitlines()[int(number) % 2]})
        elif node["class_type"] == "FluxKontextImageScale":  # to a megapixel
            node.update(class_type="ImageScaleToMaxDimension", inputs={**inputs, "upscale_method": "area", "largest_size": SIDE})
        inputs = node["inputs"]
        small = {"steps": 2, "width": SIDE, "height": SIDE, "largest_size": SIDE}
        inputs.update({name: value for name, value in small.items() if name in inputs})
        # The words node's outputs are a list of conditionings and one conditioning; a text encoder's only output is the latter.
        inputs.update({name: [value[0], 1] for name, value in inputs.items() if isinstance(value, list) and value[0] in encoders})
    assert workflow.problems(prompt, object_info) == []
    return prompt


def pictures(server: Server, outputs: dict, kind: str = "output") -> list[np.ndarray]:
    """The pictures that a prompt's nodes saved, or with kind "temp" previewed, in the order of the nodes."""
    found = [image for number in sorted(outputs, key=int) for image in outputs[number].get("images", []) if image["type"] == kind]
    return [np.asarray(Image.open(io.BytesIO(server.client.picture(image)))) for image in found]


@pytest.fixture(scope="module")
def models(server: Server) -> Iterator[Path]:
    """The server's folder of models, with small 16-bit models and LoRAs under the templates' names while this module's tests run."""
    folder = server.base / "models"
    before = set(folder.rglob("*.safetensors"))
    for name in ("diffusion_models", "vae", "loras"):
        (folder / name).mkdir(exist_ok=True)
    shutil.copy(folder / "diffusion_models" / TINY["diffusion_models"], folder / "diffusion_models" / "flux1-dev.safetensors")
    shutil.copy(folder / "vae" / TINY["vae"], folder / "vae" / "ae.safetensors")
    for seed, name in enumerate(name for name in model_files(GRAPHS["SVDQuant_LoRA_stack"]) if "lora" in name):
        save_file({f"transformer.single_transformer_blocks.{block}.proj_out.{leaf}.weight": tensor.contiguous() for block in range(2)
                   for leaf, tensor in lora_pair(256, 1280, seed)}, folder / "loras" / name)
    yield folder
    for path in set(folder.rglob("*.safetensors")) - before:
        path.unlink()


def lora_pair(outputs: int, inputs: int, seed: int, rank: int = 4) -> list[tuple[str, torch.Tensor]]:
    """Random factors of a LoRA on a linear of this size, whose product is about as large as the linear's weight."""
    g = torch.Generator().manual_seed(seed)
    return [("lora_A", torch.randn(rank, inputs, generator=g) / inputs**0.5), ("lora_B", torch.randn(outputs, rank, generator=g))]


# {the 4-bit file that a template loads: how its model differs from FLUX.1 dev; None: not at all}
PUBLISHED = {
    "svdq-int4_r32-flux.1-dev.safetensors": None,
    "svdq-int4_r32-flux.1-kontext-dev.safetensors": None,
    "svdq-int4_r32-flux.1-schnell.safetensors": {"guidance": False},
    "svdq-int4_r32-flux.1-fill-dev.safetensors": {"in_channels": 96},
    "svdq-int4_r32-flux.1-canny-dev.safetensors": {"in_channels": 32},
}


@pytest.fixture(scope="module")
def published(server: Server, models: Path) -> dict:
    """The 4-bit files that templates load, in Nunchaku's layout, made by the pack's nodes from the tiny or a random model."""
    for name, changes in PUBLISHED.items():
        source = "flux1-dev.safetensors"
        if changes is not None:
            source = f"16-bit {name}"
            save_file(flux_tensors(**changes), models / "diffusion_models" / source)
        server.client.post({
            "1": {"class_type": "SVDQuantLoadModel", "inputs": {"model_name": source, "compute_dtype": "auto"}},
            "2": {"class_type": "SVDQuantQuantizeModel",
                  "inputs": {"model": ["1", 0], "steps": 1, "seed": 0, "rank": 32, "preset": "data-free"}},
            "3": {"class_type": "SVDQuantSaveModel",
                  "inputs": {"model": ["2", 0], "filename": name, "overwrite": False, "layout": "nunchaku"}},
        })
    return PUBLISHED


def test_every_4_bit_file_of_the_templates_has_a_stand_in():
    named = {name for graph in GRAPHS.values() for name in model_files(graph) if name.startswith("svdq-")}
    assert named == PUBLISHED.keys()


# {template that quantizes a model of another family: the stand-in's tensors}
QUANTIZING = {
    "SVDQuant_quantize_Chroma": lambda: chroma_tensors(depth_single=1),
    "SVDQuant_quantize_FLUX2": lambda: random_tensors(flux2_shapes(depth_single=1, guidance=False)),
    "SVDQuant_quantize_Qwen-Image": lambda: random_tensors(qwen_image_shapes(depth=1)),
    "SVDQuant_quantize_Z-Image": lambda: random_tensors(z_image_shapes(depth=1, refiners=1)),
}


@pytest.mark.parametrize("name", [
    name if name == "SVDQuant_quantize_FLUX2" else pytest.param(name, marks=pytest.mark.heavy) for name in QUANTIZING])
def test_another_familys_quantizing_template_runs_and_its_file_samples(server, models, object_info, name):
    prompt = shrunk(GRAPHS[name], object_info)
    by_class = {node["class_type"]: node["inputs"] for node in prompt.values()}
    save_file(QUANTIZING[name](), models / "diffusion_models" / by_class["SVDQuantLoadModel"]["model_name"])
    outputs = server.client.post(prompt)
    assert any("W4A4" in text for output in outputs.values() for text in output.get("text", []))
    [latent] = (number for number, node in prompt.items() if node["class_type"].startswith("Empty"))
    words = next(number for number, node in prompt.items() if node["class_type"] == "SVDQuantDemoWords")
    sampled = server.client.post({
        latent: prompt[latent], words: prompt[words],
        "101": {"class_type": "SVDQuantLoadModel",
                "inputs": {"model_name": by_class["SVDQuantSaveModel"]["filename"] + ".safetensors", "compute_dtype": "auto"}},
        "102": {"class_type": "KSampler", "inputs": {"model": ["101", 0], "positive": [words, 1], "negative": [words, 1],
                                                     "latent_image": [latent, 0], "seed": 0, "steps": 1, "cfg": 1.0,
                                                     "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}},
        "103": {"class_type": "SaveLatent", "inputs": {"samples": ["102", 0], "filename_prefix": name}},
    })
    assert sampled["103"]["latents"]


def test_the_quantizing_template_runs_and_its_file_draws(server, models, object_info):
    graph = GRAPHS["SVDQuant_quantize_FLUX1"]
    outputs = server.client.post(shrunk(graph, object_info))
    assert any("W4A4" in text for output in outputs.values() for text in output.get("text", []))
    [chart] = pictures(server, outputs, "temp")
    assert chart.std() > 1
    assert (models / "diffusion_models" / "flux1-dev-svdquant.safetensors").is_file()
    prompt = shrunk(GRAPHS["SVDQuant_FLUX1-dev_text_to_image"], object_info)
    for node in prompt.values():
        if node["class_type"] == "SVDQuantLoadModel":
            node["inputs"]["model_name"] = "flux1-dev-svdquant.safetensors"
    [picture] = pictures(server, server.client.post(prompt))
    assert picture.shape == (SIDE, SIDE, 3)


# {template: number of pictures that it saves}
DRAWING = {
    "SVDQuant_FLUX1-dev_text_to_image": 1,
    "SVDQuant_FLUX1-schnell_4_steps": 1,
    "SVDQuant_image_to_image": 1,
    "SVDQuant_LoRA_stack": 1,
    "SVDQuant_compare_16_and_4_bits": 2,
    "SVDQuant_FLUX1-Fill_inpaint": 1,
    "SVDQuant_FLUX1-Kontext_edit": 1,
    "SVDQuant_FLUX1-Canny_control": 1,
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_drawing_template_runs(server, published, object_info, name):
    drawn = pictures(server, server.client.post(shrunk(GRAPHS[name], object_info)))
    assert len(drawn) == DRAWING[name]
    assert all(picture.std() > 1 for picture in drawn)
    for one, other in combinations(drawn, 2):
        assert one.tobytes() != other.tobytes(), "the 4-bit model drew the same bytes as the 16-bit one"


def test_each_lora_of_the_stack_changes_the_picture(server, published, object_info):
    prompt = shrunk(GRAPHS["SVDQuant_LoRA_stack"], object_info)
    loras = [node["inputs"] for node in prompt.values() if node["class_type"] == "LoraLoaderModelOnly"]
    drawn = []
    for strengths in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        for lora, strength in zip(loras, strengths):
            lora["strength_model"] = strength
        drawn += [picture.tobytes() for picture in pictures(server, server.client.post(prompt))]
    assert len(set(drawn)) == 4


def siglip() -> dict:
    """An image encoder that ComfyUI takes for SigLIP: of its size, which ComfyUI does not read from a file, in FP8. Only the patches'
    embedding is not zero, so that a picture passes the layers unchanged."""
    hidden, mlp, layers = 1152, 4304, 27
    g = torch.Generator().manual_seed(2)
    shapes = {"layer_norm1": (hidden,), "layer_norm2": (hidden,), "mlp.fc1": (mlp, hidden), "mlp.fc2": (hidden, mlp)}
    shapes |= {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
    tensors = {f"encoder.layers.{layer}.{name}.{leaf}": torch.zeros(shape if leaf == "weight" else shape[:1])
               for layer in range(layers) for name, shape in shapes.items() for leaf in ("weight", "bias")}
    patches = torch.randn(hidden, 3, 14, 14, generator=g) / (3 * 14 * 14) ** 0.5
    tensors |= {"embeddings.patch_embedding.weight": patches, "embeddings.patch_embedding.bias": torch.zeros(hidden),
                "embeddings.position_embedding.weight": torch.zeros(729, hidden),
                "post_layernorm.weight": torch.ones(hidden), "post_layernorm.bias": torch.zeros(hidden)}
    return {f"vision_model.{name}": tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}


def redux(width: int = 4096) -> dict:
    """A random Redux, from SigLIP's 1152 channels to text tokens."""
    g = torch.Generator().manual_seed(3)
    shapes = {"redux_up": (3 * width, 1152), "redux_down": (width, 3 * width)}
    weights = {f"{name}.weight": (torch.randn(shape, generator=g) / shape[1] ** 0.5).bfloat16() for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.zeros(shape[0], dtype=torch.bfloat16) for name, shape in shapes.items()}


@pytest.mark.heavy  # the image encoder that Redux needs takes 5 GB
def test_the_redux_template_runs(server, models, object_info):
    """With a FLUX.1 that reads text tokens of 4096 channels, the only width for which ComfyUI has a Redux."""
    graph = GRAPHS["SVDQuant_FLUX1-Redux_variations"]
    [style] = (name for name in model_files(graph) if "redux" in name)
    [encoder] = (name for name in model_files(graph) if "sigclip" in name)
    for folder, name, tensors in (("style_models", style, redux()), ("clip_vision", encoder, siglip()),
                                  ("diffusion_models", "reads 4096.safetensors", flux_tensors(context=4096))):
        (models / folder).mkdir(exist_ok=True)
        save_file(tensors, models / folder / name)
    prompt = shrunk(graph, object_info)
    by_class = {node["class_type"]: node["inputs"] for node in prompt.values()}
    by_class["SVDQuantLoadModel"]["model_name"] = "reads 4096.safetensors"
    prompt["wide"] = {"class_type": "SVDQuantDemoWidenConditioning",
                      "inputs": {"conditioning": by_class["StyleModelApply"]["conditioning"], "channels": 4096}}
    by_class["StyleModelApply"]["conditioning"] = ["wide", 0]
    drawn = []
    for strength in (0.0, 1.0):
        by_class["StyleModelApply"]["strength"] = strength
        drawn += pictures(server, server.client.post(prompt))
    assert drawn[0].std() > 1
    assert not np.array_equal(*drawn), "Redux changes nothing"


def test_the_controlnet_template_runs(server, models, object_info):
    """At FLUX.1's width, without which ComfyUI 0.3.75 knows no ControlNet; one double block, and one single block in the model."""
    hidden = 3072
    [control] = (name for name in model_files(GRAPHS["SVDQuant_FLUX1_ControlNet"]) if "controlnet" in name)
    (models / "controlnet").mkdir(exist_ok=True)
    flux = flux_tensors(hidden=hidden, depth=1, depth_single=1)
    save_file(flux, models / "diffusion_models" / "wide.safetensors")
    save_file(xlabs_controlnet(flux, hidden), models / "controlnet" / control)
    prompt = shrunk(GRAPHS["SVDQuant_FLUX1_ControlNet"], object_info)
    strengths = [node["inputs"] for node in prompt.values() if node["class_type"] == "ControlNetApplyAdvanced"]
    for node in prompt.values():
        if node["class_type"] == "SVDQuantLoadModel":
            node["inputs"]["model_name"] = "wide.safetensors"
    drawn = []
    for strength in (0.0, 0.7):
        strengths[0]["strength"] = strength
        outputs = server.client.post(prompt)
        drawn += pictures(server, outputs)
    assert drawn[0].std() > 1
    assert not np.array_equal(*drawn), "the ControlNet changes nothing"


def xlabs_controlnet(flux: dict, hidden: int) -> dict:
    """A ControlNet in XLabs' format on the double blocks of a FLUX.1: its hint's convolutions halve a picture's sides three times."""
    g = torch.Generator().manual_seed(1)
    tensors = {name: tensor for name, tensor in flux.items() if not name.startswith(("final_layer", "single_blocks"))}
    shapes = {"pos_embed_input": (hidden, 64), "controlnet_blocks.0": (hidden, hidden)}
    shapes |= {f"input_hint_block.{2 * i}": (16, 3 if i == 0 else 16, 3, 3) for i in range(8)}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel()
        tensors[f"{name}.weight"] = (torch.randn(shape, generator=g) * (1.5 / fan_in) ** 0.5).bfloat16()
        tensors[f"{name}.bias"] = torch.zeros(shape[0], dtype=torch.bfloat16)
    return tensors
