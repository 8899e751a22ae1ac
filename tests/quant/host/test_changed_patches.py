"""Another strength, another LoRA, or none, on a model that is whole on its device: the same model as one loaded anew, without a reload."""

import copy

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import pytest
import torch

from ..comfy_models import sample
from ..lora_tensors import FC1, LINEAR1, MOD, QKV, RANK, generic, load_lora, random, shapes

pytestmark = pytest.mark.usefixtures("device")


def loaded(patcher):
    """The patcher, loaded as ComfyUI does before it draws."""
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def tensors_of(patcher):
    """{name: tensor} that the model computes with: parameters and LoRA branches."""
    found = {name: t.clone() for name, t in patcher.model.diffusion_model.state_dict().items()}
    for name, layer in patcher.packed_layers().items():
        if layer.lora_branch is not None:
            found |= {f"{name}.{part}": t.clone() for part, t in layer.lora_branch.named_buffers()}
    return found


def anew(patcher):
    """tensors_of a patcher that is loaded into an unloaded model."""
    comfy.model_management.unload_all_models()
    return tensors_of(loaded(patcher))


@pytest.fixture
def loads(monkeypatch):
    """A list that gets an entry for each of ComfyUI's loads."""
    calls, load = [], comfy.model_patcher.ModelPatcher.load

    def recorded(patcher, *args, **kwargs):
        calls.append(patcher)
        return load(patcher, *args, **kwargs)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", recorded)
    return calls


def histories(model):
    """MODELs in the order in which a user may draw with them: other strengths, biases, 16-bit layers, none, two LoRAs."""
    packed = generic(*((name, shapes(model)[name]) for name in (QKV, FC1, LINEAR1, MOD)))
    others = {"diffusion_model.img_in.diff": 0.1 * random(*model.model.diffusion_model.img_in.weight.shape),
              f"diffusion_model.{QKV}.diff_b": 0.1 * random(model.packed_layers()[QKV].out_features)}
    return [model, load_lora(model, packed, 1.0), load_lora(model, packed, 0.5), load_lora(load_lora(model, others, 1.0), packed, 0.5),
            load_lora(model, others, -1.0), model, load_lora(load_lora(model, packed, 0.3), others, 0.3)]


def test_each_model_is_as_if_loaded_anew(quantized_model, loads):
    patchers = histories(quantized_model)
    expected = [anew(patcher) for patcher in patchers]
    comfy.model_management.unload_all_models()
    loaded(patchers[0])
    loads.clear()
    for i in (1, 2, 3, 4, 5, 6, 2, 0, 3, 3):
        found = tensors_of(loaded(patchers[i]))
        assert found.keys() == expected[i].keys(), f"model {i}"
        assert all(torch.equal(t, expected[i][name]) for name, t in found.items()), f"model {i}"
    assert not loads, "ComfyUI carried the model out and in"


def test_another_strength_writes_strengths_alone(quantized_model, monkeypatch):
    """The branches and their factors stay the same tensors, so that cached launches stay valid, and no kernel is compiled. A strength that
    comes back brings the same bits: nothing is rounded again."""
    warmed, packed = [], generic(*shapes(quantized_model).items())
    other = generic(*shapes(quantized_model).items(), rank=2)
    monkeypatch.setattr("comfyui_svdquant.quant.host.patcher.warm_up", lambda *args: warmed.append(args))
    first = loaded(load_lora(load_lora(quantized_model, packed, 1.0), other, 0.3))
    branches = {name: layer.lora_branch for name, layer in first.packed_layers().items()}
    addresses = {name: [tensor.data_ptr() for tensor in branch.buffers()] for name, branch in branches.items()}
    before, picture = tensors_of(first), sample(first)
    assert len(warmed) == 1 and branches.keys() == shapes(quantized_model).keys()
    for strengths in ((0.7, 0.3), (-1 / 3, 1.9), (1e-3, 0.1), (1.0, 0.3)):
        again = load_lora(load_lora(quantized_model, packed, strengths[0]), other, strengths[1])
        found = tensors_of(loaded(again))
        assert all(layer.lora_branch is branches[name] for name, layer in again.packed_layers().items())
        assert all([tensor.data_ptr() for tensor in branch.buffers()] == addresses[name] for name, branch in branches.items())
        changed = {name.rpartition(".")[2] for name, tensor in found.items() if not torch.equal(tensor, before[name])}
        assert changed == (set() if strengths == (1.0, 0.3) else {"lora_strength"})
        assert torch.equal(sample(again), picture) is (strengths == (1.0, 0.3))
    assert len(warmed) == 1
    loaded(load_lora(quantized_model, packed, 0.7))
    assert len(warmed) == 2, "a LoRA less: other sizes"


@pytest.mark.usefixtures("shared_memory")
def test_memory_is_counted(quantized_model):
    patchers = histories(quantized_model)
    for patcher in patchers:
        assert loaded(patcher).loaded_size() == patcher.model_size()
    comfy.model_management.unload_all_models()


def test_a_model_that_would_outgrow_its_room_is_loaded_by_comfyui(quantized_model, loads):
    plain, patched = histories(quantized_model)[:2]
    loaded(plain)
    loads.clear()
    patched.partially_load(patched.load_device, extra_memory=patched.model_size() - plain.model_size() - 1)
    assert loads == [patched]


def test_callbacks_of_a_load_are_called(quantized_model, loads):
    plain, patched = histories(quantized_model)[:2]
    loaded(plain)
    called = []
    patched.add_callback(comfy.patcher_extension.CallbacksMP.ON_LOAD, lambda *args: called.append(args))
    loaded(patched)
    assert len(called) == 1


def test_weights_return_to_the_device_of_the_model(quantized_model):
    """ComfyUI keeps the originals of patched weights on the offload device. The meta device stands for a GPU."""
    others = {"diffusion_model.img_in.diff": 0.1 * random(*quantized_model.model.diffusion_model.img_in.weight.shape)}
    patched, device = load_lora(quantized_model, others), torch.device("meta")
    for patcher in (patched, quantized_model):
        patcher.load_device = device
        patcher.partially_load(device, extra_memory=1e32)
        assert {t.device for t in patcher.model.diffusion_model.state_dict().values()} == {device}


def test_weight_wrappers_come_and_go(quantized_model, loads):
    """Functions of other nodes around 16-bit weights, which ComfyUI attaches when it loads a model."""
    def wrapper(weight):
        return weight

    plain, patched = histories(quantized_model)[:2]
    wrapped, layer = plain.clone(), plain.model.diffusion_model.img_in
    wrapped.add_weight_wrapper("diffusion_model.img_in.weight", wrapper)
    for patcher in (patched, wrapped, load_lora(wrapped, generic((QKV, shapes(plain)[QKV]))), plain, patched):
        loaded(patcher)
        assert layer.weight_function == (patcher.weight_wrapper_patches and [wrapper] or [])
    assert len(loads) == 3, "with the same wrappers ComfyUI need not load the model"


def test_patches_of_a_module_that_a_node_replaces(quantized_model):
    """A weight patch is for the module that an object patch puts in place of the model's own."""
    others = {"diffusion_model.img_in.diff": 0.1 * random(*quantized_model.model.diffusion_model.img_in.weight.shape)}
    replaced = load_lora(quantized_model, others)
    replaced.add_object_patch("diffusion_model.img_in", copy.deepcopy(quantized_model.model.diffusion_model.img_in))
    expected = anew(replaced)
    loaded(quantized_model)
    found = tensors_of(loaded(replaced))
    assert all(torch.equal(t, found[name]) for name, t in expected.items())
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("fails", ["_attach", "_patch_in_place"])
def test_a_change_that_fails_unloads_the_model(quantized_model, monkeypatch, fails):
    plain, _, _, patched = histories(quantized_model)[:4]
    before = tensors_of(loaded(plain))

    def failing(self, *args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(type(patched), fails, failing)
        loaded(patched)
    assert plain.loaded_size() == 0 and plain.model.current_weight_patches_uuid is None
    found = tensors_of(loaded(plain))
    assert found.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in found.items())


@pytest.mark.usefixtures("shared_memory")
def test_memory_is_counted_while_hooks_are_applied(quantized_model):
    plain, patched = histories(quantized_model)[:2]
    hook = comfy.hooks.WeightHook()
    plain.add_hook_patches(hook, {f"diffusion_model.{QKV}.weight": patched.patches[f"diffusion_model.{QKV}.weight"][0][1]})
    group = comfy.hooks.HookGroup()
    group.add(hook)
    loaded(plain).patch_hooks(group)
    assert plain.packed_layers()[QKV].lora_branch is not None
    assert loaded(patched).loaded_size() == patched.model_size()
    comfy.model_management.unload_all_models()


def test_pictures(quantized_model):
    """Between two draws with the LoRA, one without it gives the model's own picture, to the bit."""
    patchers = histories(quantized_model)
    before, with_lora = sample(patchers[0]), sample(patchers[1])
    assert torch.equal(sample(patchers[0]), before) and torch.equal(sample(patchers[1]), with_lora)
    assert not torch.equal(before, with_lora)


def test_a_hooks_branch_keeps_its_strengths(quantized_model):
    """Also where another node pack's loading gives the model the same LoRA at another strength while the hook is applied."""
    key, hook, group = f"diffusion_model.{QKV}.weight", comfy.hooks.WeightHook(), comfy.hooks.HookGroup()
    patched = load_lora(quantized_model, generic((QKV, shapes(quantized_model)[QKV])), 0.5)
    quantized_model.add_hook_patches(hook, {key: patched.patches[key][0][1]})
    group.add(hook)
    loaded(quantized_model).patch_hooks(group)
    layer = quantized_model.packed_layers()[QKV]
    branch = layer.lora_branch
    patched.patch_weight_to_device(key)
    assert (branch.lora_strength == 1).all() and (layer.lora_branch.lora_strength[:RANK] == 0.5).all()
