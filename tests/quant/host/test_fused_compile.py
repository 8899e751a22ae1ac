"""torch.compile of a newly loaded model whose blocks have fused forwards: no breaks, few nodes, no more graphs than the host's forwards."""

import logging
from collections import Counter

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfyui_svdquant.cuda import mlp
from comfyui_svdquant.quant.host import fused_blocks, loader
from comfyui_svdquant.quant.layers.linear import SVDQuantLinear
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import save_file
from torch._dynamo.backends.common import aot_autograd

from ..comfy_models import quantized, sample, save, save_expanded, write_flux
from ..family_cases import QWEN_IMAGE, Z_IMAGE
from ..lora_tensors import generic, load_lora, shapes
from .test_compile import calls, fresh_dynamo, plain_attention  # noqa: F401

pytestmark = pytest.mark.usefixtures("inference_mode")
DOUBLE, SINGLE = 2, 3
NORMS = 4 * DOUBLE + SINGLE  # passes of modulate: two before qkv, two between the parts of a double block; one a single block
GATED = 4 * DOUBLE + SINGLE  # layers that are added to the states


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{bits of the branches: a model's file}: with the same branches, in 8 bits and expanded."""
    folder = tmp_path_factory.mktemp("models")
    with torch.inference_mode():
        plain = loader.load_model(write_flux(folder / "flux.safetensors", depth=DOUBLE, depth_single=SINGLE))
        model = quantized(plain, "data-free")[0]
        return {8: save(model, folder / "4bit.safetensors"), 16: save_expanded(model, folder / "expanded.safetensors")}


@pytest.fixture
def file(files):
    return files[8]


@pytest.fixture(autouse=True)
def no_traces(monkeypatch):
    """pytest's log would keep every trace, which takes longer than tracing."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


@pytest.fixture(params=[True, False], ids=["fused", "the host's"])
def fused(request, monkeypatch):
    if torch.cuda.is_available() and request.param:
        return True
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    monkeypatch.setattr(fused_blocks.block_ops, "takes", lambda dtype, device: request.param)
    return request.param


# The host's own blocks have fewer parts that could need another graph.
FUSED_ALWAYS = pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.heavy)], indirect=True,
                                       ids=["fused", "the host's"])


def fresh(file, act_bits=8):
    return plain_attention(loader.load_model(file, act_bits=act_bits))


def compiled(patcher, backend, keys=("diffusion_model",), options=None):
    set_torch_compile_wrapper(patcher, backend=backend, keys=list(keys), options=options, fullgraph=True)  # a break is an error
    return patcher


class Graphs(list):
    def __call__(self, graph, example_inputs):
        self.append(graph)
        return graph.forward


def block_names():
    return [f"diffusion_model.{kind}_blocks.{i}" for kind, count in (("double", DOUBLE), ("single", SINGLE)) for i in range(count)]


def test_a_whole_model_is_one_graph(file, fused):
    graphs = Graphs()
    latent = sample(compiled(fresh(file), graphs))
    assert len(graphs) == 1
    assert calls(graphs, "svdquant.modulate") == fused * NORMS and calls(graphs, "svdquant.gated_linear") == fused * GATED
    assert calls(graphs, "svdquant.qk_norm_rope") == fused * (DOUBLE + SINGLE)
    assert calls(graphs) <= (330 if fused else 515), "as measured: 311 nodes, and 490 of ComfyUI 0.3.75's forwards"
    assert torch.equal(latent, sample(fresh(file))), "the same bits as without torch.compile"


@pytest.mark.parametrize(("fused", "act_bits"), [(True, 8), (False, 4)], indirect=["fused"], ids=["fused", "the host's"])
def test_a_branch_in_8_bits_is_a_matter_of_its_layers_op(files, fused, act_bits, monkeypatch):
    """The graphs that aot_autograd makes have the operations of those with branches in 16 bits, one by one. The MLPs with 4-bit
    activations are one op each, also on a GPU where two are faster."""
    monkeypatch.setattr(mlp, "pays", lambda device: True)
    counts, latents = {}, {}
    for bits, path in files.items():
        graphs = Graphs()
        latents[bits] = sample(compiled(fresh(path, act_bits), aot_autograd(fw_compiler=graphs)))
        [graph] = graphs
        counts[bits] = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        torch._dynamo.reset()
    assert counts[8] == counts[16]
    layers = sum(isinstance(layer, SVDQuantLinear) for layer in loader.load_model(files[8]).packed_layers().values())
    found = {name: counts[8][f"svdquant.{name}.default"] for name in ("linear", "gated_linear", "mlp")}
    assert found["linear"] + found["gated_linear"] + 2 * found["mlp"] == layers and found["gated_linear" if fused else "mlp"]
    assert torch.equal(latents[8], latents[16])


@FUSED_ALWAYS
def test_blocks_compiled_one_by_one_share_a_graph_a_kind(file, fused):
    graphs = Graphs()
    latent = sample(compiled(fresh(file), graphs, block_names()))
    assert len(graphs) == 2 and calls(graphs, "svdquant.qk_norm_rope") == fused * 2
    assert torch.equal(latent, sample(fresh(file)))


@FUSED_ALWAYS
def test_another_strength_of_a_lora_needs_no_other_graph(file, fused):
    patcher, graphs, latents = fresh(file), Graphs(), []
    tensors = generic(*shapes(patcher).items())
    for strength in (1.0, 0.4, -0.7):
        latents.append(sample(compiled(load_lora(patcher, tensors, strength), graphs)))
        assert len(graphs) == 1
    assert all(relative_error(latents[0], other) > 0.05 for other in latents[1:])


@FUSED_ALWAYS
@pytest.mark.parametrize("replaced", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_attention_that_somebody_replaces_is_traced(file, fused, monkeypatch, replaced):
    """Before tracing, and after it."""
    import comfy.ldm.flux.layers

    def other(q, k, v, pe, mask=None, transformer_options=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    graphs = Graphs()
    patcher = compiled(fresh(file), graphs)
    if not replaced:
        sample(patcher)
        graphs.clear()
    monkeypatch.setattr(comfy.ldm.flux.layers, "attention", other)
    latent = sample(patcher)
    assert len(graphs) == 1 and not calls(graphs, "svdquant.qk_norm_rope")
    assert torch.equal(latent, sample(fresh(file)))


@pytest.fixture(scope="module", params=(QWEN_IMAGE, Z_IMAGE), ids=str)
def of_family(request, tmp_path_factory):
    """(Case, the file of its quantized model)"""
    case, folder = request.param, tmp_path_factory.mktemp("models")
    save_file(case.tensors(), folder / "16bit.safetensors")
    with torch.inference_mode():
        return case, save(case.quantized(loader.load_model(str(folder / "16bit.safetensors")), "data-free")[0], folder / "4bit.safetensors")


@pytest.mark.parametrize("fused", [True], indirect=True, ids=["fused"])
def test_a_model_of_another_family_is_one_graph(of_family, fused):
    case, path = of_family
    graphs = Graphs()
    latent = case.sample(compiled(fresh(path), graphs))
    blocks = case.family.running_blocks(loader.load_model(path).model.diffusion_model)
    assert len(graphs) == 1 and calls(graphs, "svdquant.qk_norm_rope") == len(blocks)
    assert relative_error(latent, case.sample(fresh(path))) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [("diffusion_model",), tuple(block_names())], ids=["whole", "blocks"])
def test_inductors_code_has_the_eager_models_latents(file, keys):
    """With the eager model's rounding: without it ComfyUI's embedding of the guidance, 1000 times a bfloat16 number, is another one."""
    eager = sample(fresh(file))
    latent = sample(compiled(fresh(file), "inductor", keys, {"emulate_precision_casts": True}))
    assert relative_error(latent, eager) < 0.02, f"relative error {relative_error(latent, eager):.2g}: more than bfloat16's rounding"
