"""The users' templates: their entries in the list, their fit with the server's nodes, and their runs."""

import io
import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from host import workflow
from host.server import PACK, TINY, Server

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
GRAPHS = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
CAPTIONS = "small red circle left of large blue star on white\nlarge yellow moon above small green square on navy"
DEMO = json.loads((ROOT / "demo" / "custom_node" / "workflows" / "SVDQuant_demo.json").read_text(encoding="utf-8"))
TITLE = 30  # pixels above a node's position
# Pixels of each part of a node in the page's newer renderer ("Nodes 2.0"); the older one takes less.
MARGINS, SLOT, WIDGET, MULTILINE = 24, 24, 32, 68
PACK_NAME = 24  # the line with the name of a node's pack, unless it is ComfyUI
MISSING_FILE = 28  # the line under a loader whose file is missing
# Text that a node shows after its run is no widget of its schema; PreviewAny's text also has a switch.
SHOWN_TEXT = {"SVDQuantLoadModel": 64, "SVDQuantQuantizeModel": 64, "PreviewAny": 104}
SIDE = 64  # pixels per side of the tests' pictures

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def object_info(server: Server) -> dict:
    return server.client.object_info()


@pytest.fixture(params=NAMES)
def graph(request: pytest.FixtureRequest) -> dict:
    return GRAPHS[request.param]


@pytest.fixture(params=[*GRAPHS.values(), DEMO], ids=[*NAMES, "SVDQuant_demo"])
def layout(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_the_server_lists_and_serves_it(server, name):
    assert name in server.client.get("/workflow_templates")[PACK]
    assert server.client.get(f"/api/workflow_templates/{PACK}/{name}.json") == GRAPHS[name]
    thumbnail = server.client.fetch(f"/api/workflow_templates/{PACK}/{name}.jpg")
    assert Image.open(io.BytesIO(thumbnail)).format == "JPEG"
    assert len(thumbnail) < 100_000


@pytest.mark.parametrize("name", NAMES)
def test_its_name_works_in_a_link(name):
    assert re.fullmatch("[A-Za-z0-9_-]+", name), "the page ignores ?template= with any other character"


def test_it_fits_the_servers_nodes(graph, object_info):
    assert workflow.problems(workflow.to_prompt(graph, object_info), object_info) == []


def test_no_node_has_a_widget_value_too_many(graph, object_info):
    for node in graph["nodes"]:
        if node.get("widgets_values") and node["type"] not in workflow.NOTES:
            with pytest.raises(workflow.WorkflowError, match="has no value for"):
                workflow.widget_values({**node, "widgets_values": node["widgets_values"][:-1]}, object_info[node["type"]])


def test_links_and_nodes_agree(graph):
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, out_slot, target, in_slot, kind in graph["links"]:
        assert number in nodes[source]["outputs"][out_slot]["links"]
        assert nodes[target]["inputs"][in_slot]["link"] == number
        assert nodes[source]["outputs"][out_slot]["type"] == kind
    assert sum(len(out["links"]) for node in nodes.values() for out in node["outputs"]) == len(graph["links"])


def test_every_node_names_its_pack(graph):
    for node in graph["nodes"]:
        if node["type"] not in workflow.NOTES:
            pack = "svdquant" if node["type"].startswith("SVDQuant") else "comfy-core"
            assert node["properties"]["cnr_id"] == pack
            assert node["properties"]["ver"]
            assert node["properties"]["Node name for S&R"] == node["type"]


def test_model_links_name_a_chosen_file_and_a_known_folder(graph, server):
    folders = {folder["name"] for folder in server.client.get("/experiment/models")}
    for node in graph["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"]
            assert model["directory"] in folders
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith("/" + model["name"])


def least_height(node: dict, info: dict) -> int:
    """Height in pixels of a node's slots, widgets and shown text, below its title."""
    slots, widgets = 0, 0
    for kind, options in workflow.specs(info).values():
        if kind not in workflow.WIDGETS or options.get("forceInput"):
            slots += 1
        else:
            widgets += MULTILINE if options.get("multiline") else WIDGET
    height = MARGINS + SLOT * max(slots, len(info["output"])) + widgets + SHOWN_TEXT.get(node["type"], 0)
    return height + PACK_NAME * node["type"].startswith("SVDQuant") + MISSING_FILE * ("models" in node["properties"])


def box(node: dict, object_info: dict) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a node with its title. The page enlarges a node whose stored height is too small."""
    (x, y), (width, height) = node["pos"], node["size"]
    if node["type"] not in workflow.NOTES:
        height = max(height, least_height(node, object_info[node["type"]]))
    return x, y - TITLE, x + width, y + height


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def corners(group: dict) -> tuple[float, float, float, float]:
    left, top, width, height = group["bounding"]
    return left, top, left + width, top + height


def test_nothing_overlaps_and_no_node_sticks_out_of_a_group(layout, object_info):
    boxes = [(node.get("title", node["type"]), box(node, object_info)) for node in layout["nodes"]]
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if overlap(one, other)] == []
    groups = [(group["title"], corners(group)) for group in layout["groups"]]
    assert [(a, b) for (a, one), (b, other) in combinations(groups, 2) if overlap(one, other)] == []
    for name, (left, top, right, bottom) in boxes:
        for title, group in groups:
            within = group[0] < left and right < group[2] and group[1] < top and bottom < group[3]
            assert within or not overlap((left, top, right, bottom), group), f"{name} sticks out of {title}"


def test_every_step_is_in_a_group(graph, object_info):
    for node in graph["nodes"]:
        homes = [group["title"] for group in graph["groups"] if overlap(box(node, object_info), corners(group))]
        assert len(homes) == (node["type"] not in workflow.NOTES), node.get("title", node["type"])


def test_a_node_that_shows_text_is_stored_with_room_for_it(layout, object_info):
    for node in layout["nodes"]:
        if node["type"] in SHOWN_TEXT:
            least = least_height({**node, "properties": {}}, object_info[node["type"]])  # the height if no file is missing
            assert node["size"][1] >= least, node.get("title", node["type"])


def shrunk(graph: dict, object_info: dict) -> dict:
    """The template's prompt for the tiny model: with its files, its words node in place of text encoders, few steps, small pictures."""
    prompt = workflow.to_prompt(graph, object_info)
    encoders = {number for number, node in prompt.items() if node["class_type"] == "CLIPTextEncode"}
    for number, node in list(prompt.items()):
        inputs = node["inputs"]
        if node["class_type"] == "DualCLIPLoader":
            del prompt[number]
        elif number in encoders:
            node.update(class_type="SVDQuantDemoWords", inputs={"text": CAPTIONS.splitlines()[int(number) % 2]})
        elif node["class_type"] == "VAELoader":
            inputs["vae_name"] = TINY["vae"]
        elif inputs.get("model_name") == "flux1-dev.safetensors":
            inputs["model_name"] = TINY["diffusion_models"]
        elif node["class_type"] == "EmptySD3LatentImage":
            inputs.update(width=SIDE, height=SIDE)
        if "steps" in inputs:
            inputs["steps"] = 2
        # The words node's outputs are a list of conditionings and one conditioning; a text encoder's only output is the latter.
        inputs = node["inputs"]
        inputs.update({name: [value[0], 1] for name, value in inputs.items() if isinstance(value, list) and value[0] in encoders})
    assert workflow.problems(prompt, object_info) == []
    return prompt


def pictures(server: Server, outputs: dict) -> list[Image.Image]:
    found = [image for output in outputs.values() for image in output.get("images", [])]
    return [Image.open(io.BytesIO(server.client.picture(image))) for image in found]


@pytest.fixture(scope="module")
def quantized(server: Server, object_info: dict):
    """Outputs of the quantizing template. Its saved file exists while the tests of this module run."""
    saved = server.base / "models" / "diffusion_models" / "flux1-dev-svdquant.safetensors"
    yield server.client.post(shrunk(GRAPHS["Quantize_FLUX1"], object_info))
    saved.unlink()


def test_the_quantizing_template_runs_as_it_is(server, quantized):
    drawn = pictures(server, quantized)
    assert [picture.size for picture in drawn] == [(SIDE, SIDE)] * 2
    assert drawn[0].tobytes() != drawn[1].tobytes(), "the 4-bit model drew the same bytes as the 16-bit one"
    assert any("W4A4" in text for output in quantized.values() for text in output.get("text", []))


def test_the_drawing_template_runs_on_the_file_that_the_other_saves(server, quantized, object_info):
    drawn = pictures(server, server.client.post(shrunk(GRAPHS["Draw_with_4-bit_FLUX1"], object_info)))
    assert [picture.size for picture in drawn] == [(SIDE, SIDE)]
