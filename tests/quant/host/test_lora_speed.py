"""The time of a change of a LoRA's strength on layers of FLUX.1's width, and that a GPU's output is restored to the bit without it."""

import time

import comfy.model_management
import pytest
import torch
from comfyui_svdquant.quant.checkpoint.write import DTYPE_NAMES
from comfyui_svdquant.quant.families.flux1 import FAMILY
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.layers import layout
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from ..comfy_models import sample
from ..lora_tensors import LINEAR1, generic, layer_of, load_lora, shapes
from ..random_flux import flux_shapes
from .test_fuzz import write

pytestmark = pytest.mark.usefixtures("inference_mode")

HIDDEN, RANK = 3072, 32
STRENGTHS = (0.9, -0.4, 0.3, 0.8)
# Processor time for the 13 packed layers of a block of each kind. Scaling the factors of one of them takes longer than that.
MILLISECONDS = 20


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory):
    """A quantized FLUX.1 with a block of each kind in full width. Its weights are a hole in the file, which takes neither disk space nor,
    until they are used, memory."""
    shapes, entries = flux_shapes(hidden=HIDDEN, depth=1, depth_single=1), {}
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        if not FAMILY.layer(layer):
            entries[name] = ["BF16", list(shape), None]
        elif leaf == "weight":
            spec = layout.layer_spec(FAMILY.layer(layer), layer, shape, RANK, True, torch.bfloat16)
            entries |= {f"{layer}.{part}": [DTYPE_NAMES[dtype], list(size), None] for part, (size, dtype) in spec.tensors().items()}
            entries[f"{layer}.{layout.QUANT_KEY}"] = ["U8", [], bytes(layout.encode_conf(spec.conf()))]
    return str(write(tmp_path_factory.mktemp("models") / "wide.safetensors", entries, {}))


def put_on(patcher):
    """Load the patcher as a sampler does before its first step."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher


def changes(quantized_model, tensors, clock):
    """Milliseconds by `clock` from one strength to the next, for each of STRENGTHS."""
    put_on(load_lora(quantized_model, tensors, 1.0))
    taken = []
    for strength in STRENGTHS:
        patched = load_lora(quantized_model, tensors, strength)
        start = clock()
        put_on(patched)
        taken.append((clock() - start) * 1e3)
    put_on(quantized_model)
    return taken


def addresses(patcher):
    """{name: address} of all parameters but proj_down, which a LoRA branch takes into its own memory for a while."""
    return {name: parameter.data_ptr() for name, parameter in patcher.model.diffusion_model.named_parameters()
            if not name.endswith("weight_proj_down")}


@pytest.mark.usefixtures("on_cpu", "shared_memory")
def test_a_change_of_strength_costs_milliseconds(wide_file):
    quantized_model = loader.load_model(wide_file)
    tensors = generic(*shapes(quantized_model).items(), rank=RANK)
    where = addresses(quantized_model)
    taken = changes(quantized_model, tensors, time.thread_time)
    assert min(taken) < MILLISECONDS, f"{taken} ms"
    # The layers' own tensors are the loaded ones: nothing was unpacked and packed again.
    assert where == addresses(quantized_model)
    branch = layer_of(put_on(load_lora(quantized_model, tensors, 0.25)), LINEAR1).lora_branch
    assert branch.nbytes() == 2 * RANK * (7 * HIDDEN + HIDDEN) + 4 * RANK
    put_on(quantized_model)
    assert not any(layer.lora_branch for layer in quantized_model.packed_layers().values())


@pytest.mark.gpu
def test_on_a_gpu_a_change_of_strength_costs_milliseconds(wide_file):
    def clock():
        torch.cuda.synchronize()
        return time.perf_counter()

    quantized_model = loader.load_model(wide_file)
    taken = changes(quantized_model, generic(*shapes(quantized_model).items(), rank=RANK), clock)
    print(f"a change of strength: {', '.join(f'{ms:.1f}' for ms in taken)} ms for a block of each kind, rank {RANK}")
    assert min(taken) < MILLISECONDS, f"{taken} ms"
    assert all(parameter.is_cuda for parameter in quantized_model.model.diffusion_model.parameters())


@pytest.mark.gpu
def test_on_a_gpu_a_lora_is_added_changed_and_removed_to_the_bit(plain, quantized_model, drift):
    tensors = generic(*shapes(quantized_model).items(), rank=RANK)
    before = sample(quantized_model)
    state = {name: tensor.cpu() for name, tensor in quantized_model.model.state_dict().items()}
    assert all(layer.weight.is_cuda for layer in quantized_model.packed_layers().values())
    for strength in (1.0, -0.5):
        patched = load_lora(quantized_model, tensors, strength)
        y, exact = sample(patched), sample(load_lora(plain, tensors, strength))
        assert torch.equal(sample(patched), y)
        assert relative_error(y, before) > drift and relative_error(y, exact) < 1.3 * drift
    assert torch.equal(sample(quantized_model), before)
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in quantized_model.model.state_dict().items())
