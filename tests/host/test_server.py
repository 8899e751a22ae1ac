"""The pack in a real server, over HTTP, as a browser would use it."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from host.client import Client, Interrupted, NodeFailed, PromptRejected
from host.server import DEMO_NODES, PACK, Server
from host.workflow import problems, to_prompt

pytestmark = pytest.mark.server

OURS = ("SVDQuantLoadModel", "SVDQuantQuantizeModel", "SVDQuantSaveModel", "SVDQuantDemoWords")
CAPTIONS = "small red circle left of large blue star on white\nlarge green ring above medium black circle on mint"
PIXELS = 64


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return server.client


@pytest.fixture(scope="module")
def info(client: Client) -> dict:
    return client.object_info()


def template(client: Client, folder: str, name: str) -> dict:
    return client.get(f"/api/workflow_templates/{folder}/{name}.json")


def base_prompt(steps: int = 1, seed: int = 0) -> dict:
    """A small, fast prompt: words, latent, VAE, the bf16 model, and the model in naive 4 bits."""
    return {
        "words": {"class_type": "SVDQuantDemoWords", "inputs": {"text": CAPTIONS}},
        "latent": {"class_type": "EmptySD3LatentImage", "inputs": {"width": PIXELS, "height": PIXELS, "batch_size": 1}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "tiny_vae.safetensors"}},
        "model": {"class_type": "SVDQuantLoadModel", "inputs": {"model_name": "tiny_flux.safetensors", "compute_dtype": "auto"}},
        "quantized": quantize("model", steps=steps, seed=seed),
    }


def quantize(model: str, preset: str = "naive", steps: int = 1, seed: int = 0) -> dict:
    inputs = {"model": [model, 0], "positive": ["words", 1], "latent": ["latent", 0]}
    return {"class_type": "SVDQuantQuantizeModel", "inputs": {**inputs, "steps": steps, "seed": seed, "rank": 16, "preset": preset}}


def save(model: str, filename: str, overwrite: bool = False) -> dict:
    inputs = {"model": [model, 0], "filename": filename, "overwrite": overwrite}
    return {"class_type": "SVDQuantSaveModel", "inputs": inputs}


def pictures(model: str, prefix: str) -> dict:
    """Sampler, decoder and SaveImage behind a model node; the outputs have the id `prefix` of the last node."""
    sampling = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": [model, 0], "positive": ["words", 0], "negative": ["words", 0], "latent_image": ["latent", 0]}
    return {
        f"{prefix} sampler": {"class_type": "KSampler", "inputs": {**sampling, **links}},
        f"{prefix} decoder": {"class_type": "VAEDecode", "inputs": {"samples": [f"{prefix} sampler", 0], "vae": ["vae", 0]}},
        prefix: {"class_type": "SaveImage", "inputs": {"images": [f"{prefix} decoder", 0], "filename_prefix": prefix}},
    }


def pixels(client: Client, output: dict) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(client.picture(image)))) for image in output["images"]]


def test_both_packs_load_without_a_complaint(server: Server):
    lines = [line for line in server.log().splitlines() if str(server.base / "custom_nodes") in line]
    assert [line for line in lines if "seconds" in line and "FAILED" not in line] == lines
    assert len(lines) == 2


def test_every_input_and_output_has_a_tooltip(info: dict):
    for name in OURS:
        for group in ("required", "optional"):
            for given, spec in info[name]["input"].get(group, {}).items():
                assert spec[1].get("tooltip"), f"{name}: input {given}"
        assert all(info[name]["output_tooltips"]) and len(info[name]["output_tooltips"]) == len(info[name]["output"]), name
        assert info[name]["description"], name


def test_every_template_fits_the_nodes(client: Client, info: dict):
    served = client.get("/workflow_templates")
    assert served[DEMO_NODES] == ["SVDQuant_demo"]
    for folder in (PACK, DEMO_NODES):
        for name in served.get(folder, []):
            found = problems(to_prompt(template(client, folder, name), info), info)
            # The pictures that templates name are ComfyUI's own examples, which this server's input folder lacks.
            assert [problem for problem in found if not problem.startswith("LoadImage ")] == [], f"{folder}/{name}"


def test_the_demo_workflow_at_reduced_size(client: Client, info: dict):
    prompt = to_prompt(template(client, DEMO_NODES, "SVDQuant_demo"), info)
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({name: PIXELS for name in ("width", "height") if name in inputs})
        inputs.update({"steps": 2} if "steps" in inputs else {})
        inputs.update({"text": CAPTIONS} if "text" in inputs else {})
    seen = set()
    outputs = client.post(prompt, lambda node, value, total: seen.add((prompt[node]["class_type"], total > 0)))
    saved = [output["images"] for node, output in outputs.items() if prompt[node]["class_type"] == "SaveImage"]
    assert [len(images) for images in saved] == [2, 2, 2]
    assert all(Image.open(io.BytesIO(client.picture(image))).size == (PIXELS, PIXELS) for images in saved for image in images)
    assert all(output["text"][0] for node, output in outputs.items() if prompt[node]["class_type"] == "PreviewAny")
    assert {("SVDQuantQuantizeModel", True), ("KSampler", True)} <= seen


@pytest.mark.parametrize("preset", ["naive", "best"])
def test_a_reloaded_model_draws_the_same_to_the_bit(client: Client, preset: str):
    prompt = base_prompt() | pictures("model", "bf16") | pictures("quantized", "in graph") | pictures("loaded", "reloaded")
    prompt["quantized"] = quantize("model", preset)
    prompt["saved"] = save("quantized", f"same_{preset}")
    prompt["loaded"] = {"class_type": "SVDQuantLoadModel", "inputs": {"model_name": ["saved", 0], "compute_dtype": "auto"}}
    outputs = client.post(prompt)
    in_graph, reloaded, bf16 = (np.stack(pixels(client, outputs[name])) for name in ("in graph", "reloaded", "bf16"))
    assert in_graph.shape == (2, PIXELS, PIXELS, 3)
    assert np.array_equal(in_graph, reloaded)
    assert not np.array_equal(in_graph, bf16)


def test_cancel_stops_quantization_within_two_seconds(client: Client):
    prompt = base_prompt() | pictures("quantized", "cancelled")
    prompt["quantized"] = quantize("model", "fast", steps=100, seed=7)
    started, result = threading.Event(), []

    def progress(node: str, value: int, total: int) -> None:
        if node == "quantized" and value > 0:
            started.set()

    def run() -> None:
        try:
            result.append(client.post(prompt, progress))
        except Interrupted as interrupted:
            result.append(interrupted)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(timeout=60)
    before = time.monotonic()
    client.interrupt()
    thread.join(timeout=60)
    assert time.monotonic() - before < 2
    assert isinstance(result[0], Interrupted)
    assert len(client.post(base_prompt() | pictures("model", "after"))["after"]["images"]) == 2


def test_an_unknown_word_is_named(client: Client):
    prompt = base_prompt() | pictures("model", "unknown")
    prompt["words"]["inputs"]["text"] = "small red elephant on white"
    with pytest.raises(NodeFailed, match="does not know the word 'elephant'") as failure:
        client.post(prompt)
    assert failure.value.node_type == "SVDQuantDemoWords"


def test_a_file_that_is_not_there_is_named(client: Client):
    prompt = base_prompt() | pictures("model", "missing")
    prompt["model"]["inputs"]["model_name"] = "no_such_file.safetensors"
    with pytest.raises((PromptRejected, NodeFailed), match="no_such_file.safetensors"):
        client.post(prompt)


def test_a_truncated_file_is_one_sentence(server: Server):
    folder = server.base / "models" / "diffusion_models"
    whole = (folder / "tiny_flux.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    prompt = base_prompt() | pictures("model", "cut")
    prompt["model"]["inputs"]["model_name"] = "cut.safetensors"
    with pytest.raises(PromptRejected, match=r"cut\.safetensors") as failure:
        server.client.post(prompt)
    assert "\n" not in str(failure.value)


def test_a_second_quantization_is_refused(client: Client):
    prompt = base_prompt() | {"twice": quantize("quantized")} | pictures("twice", "of twice")
    with pytest.raises(NodeFailed, match="quantized already"):
        client.post(prompt)


def test_a_16_bit_model_is_not_saved(client: Client):
    with pytest.raises(NodeFailed, match="saves quantized models"):
        client.post(base_prompt() | {"saved": save("model", "sixteen")})


def test_an_existing_file_is_left_alone_unless_asked(server: Server):
    server.client.post(base_prompt(seed=1) | {"saved": save("quantized", "kept")})
    file = next((server.base / "models").rglob("kept.safetensors"))
    before = file.stat().st_mtime_ns
    started: set[str] = set()
    with pytest.raises(NodeFailed, match="kept"):
        server.client.post(base_prompt(seed=2) | {"saved": save("quantized", "kept")}, lambda node, value, total: started.add(node))
    assert file.stat().st_mtime_ns == before and started == {"saved"}, "it fails before the model is quantized"
    file.touch()  # now another program's file
    with pytest.raises(PromptRejected, match="filename - kept.safetensors exists already; choose another filename"):
        server.client.post(base_prompt(seed=2) | {"saved": save("quantized", "kept")})
    before = file.stat().st_mtime_ns
    server.client.post(base_prompt(seed=2) | {"saved": save("quantized", "kept", overwrite=True)})
    assert file.stat().st_mtime_ns > before


def test_a_deleted_saved_file_is_saved_again(server: Server):
    """For an unchanged workflow ComfyUI runs these nodes once, and again if their file is missing."""
    prompt = base_prompt(seed=3) | {"saved": save("quantized", "again"), "loaded": {
        "class_type": "SVDQuantLoadModel", "inputs": {"model_name": ["saved", 0], "compute_dtype": "auto"}}} | pictures("loaded", "again")
    path = server.base / "models" / "diffusion_models" / "again.safetensors"
    for _ in range(2):
        for ran in (True, False):
            started: set[str] = set()
            server.client.post(prompt, lambda node, value, total, started=started: started.add(node))
            assert path.is_file() and ("saved" in started) == ("loaded" in started) == ran
        path.unlink()
