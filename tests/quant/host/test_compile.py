"""torch.compile of a newly loaded model: only the ops of its layers are in the graph."""

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.layers import preparation
from comfyui_svdquant.quant.layers.linear import AWQLinear, SVDQuantLinear

from ..comfy_models import sample

pytestmark = pytest.mark.usefixtures("inference_mode")

NODES_A_LAYER = 4  # at most the op, the look-ups of its operands and a cast; the search for row scales would have 1,531


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_attention(patcher):
    """ComfyUI's attention for the CPU reads the free memory, which breaks the graph; PyTorch's doesn't."""
    patcher = patcher.clone()
    patcher.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: attention_pytorch(
        *args, **kwargs)
    return patcher


def compiled(patcher):
    """(the MODEL as ComfyUI's TorchCompileModel leaves it, the graphs that are traced)."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    patcher = plain_attention(patcher)
    set_torch_compile_wrapper(patcher, backend=backend)
    return patcher, graphs


def calls(graphs, *names):
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    return len(targets) if not names else sum(any(name in target for name in names) for target in targets)


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_graph_has_one_op_a_layer(pair_files, act_bits):
    plain, plain_graphs = compiled(loader.load_model(pair_files[0]))
    exact = sample(plain)
    torch._dynamo.reset()
    quantized, graphs = compiled(loader.load_model(pair_files[1], act_bits=act_bits))
    estimate = sample(quantized)
    kinds = [type(layer).__mro__ for layer in quantized.packed_layers().values()]
    w4a4, w4a16 = (sum(kind in mro for mro in kinds) for kind in (SVDQuantLinear, AWQLinear))
    own = calls(graphs, "svdquant.linear", "svdquant.gated_linear")  # fused blocks, which a GPU has, add some of the layers' outputs
    assert own + 2 * calls(graphs, "svdquant.mlp") == w4a4 and calls(graphs, "svdquant.awq_linear") == w4a16
    assert len(graphs) == len(plain_graphs) == 1, "no breaks of the graph"
    more = calls(graphs) - calls(plain_graphs)
    assert more <= NODES_A_LAYER * (w4a4 + w4a16), f"{more} nodes more than the 16-bit model's graph"
    eager = sample(plain_attention(loader.load_model(pair_files[1], act_bits=act_bits)))
    assert torch.equal(estimate, eager), "the same bits as without torch.compile"
    assert float((estimate - exact).norm() / exact.norm()) < 0.3


def layers_of(patcher):
    return [module for module in patcher.model.modules() if isinstance(module, SVDQuantLinear)]


def test_row_scales_are_computed_when_a_layer_gets_its_weights(pair_files):
    """They are kept after loading, moves and another state dict; in another dtype they are computed again."""
    patcher = loader.load_model(pair_files[1], act_bits=8)
    before = [layer._row_scale for layer in layers_of(patcher)]
    assert all(before)
    patcher.model.to("cpu")
    for layer, known in zip(layers_of(patcher), before):
        assert layer._row_scale.value is known.value and layer._row_scale.is_of(layer.weight_scale)
    changed = {name: tensor * 2 if name.endswith("weight_scale") else tensor
               for name, tensor in patcher.model.diffusion_model.state_dict().items()}
    patcher.model.diffusion_model.load_state_dict(changed, assign=True)
    for layer, known in zip(layers_of(patcher), before):
        assert layer._row_scale.is_of(layer.weight_scale) and torch.equal(layer._row_scale.value, 2 * known.value)
    patcher.model.half()
    assert all(layer._row_scale.is_of(layer.weight_scale) and layer._row_scale.value.dtype == torch.float32 for layer in layers_of(patcher))


@pytest.mark.heavy
def test_the_search_is_not_in_the_graph_if_act_bits_change_after_loading(pair_files):
    patcher, graphs = compiled(loader.load_model(pair_files[1]))
    preparation.set_act_bits(patcher.model, 8)
    sample(patcher)
    assert calls(graphs, "svdquant.linear") and not calls(graphs, "reciprocal")
    assert all(layer._row_scale.is_of(layer.weight_scale) for layer in layers_of(patcher))
