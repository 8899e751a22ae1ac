"""Changes to a model as cases of fused_path.compared: each function makes one, case(patcher, monkeypatch) -> (patcher, options of draw)."""

import comfy.hooks

from .fused_path import prompt
from .host.test_bypass_lora import by_hand
from .lora_tensors import generic, shapes


def mixed(states):
    return states + states.roll(1, -1)


def bypass_lora(*names, **options):
    """A LoRA on these layers beside the model. options: of lora_tensors.generic."""
    def case(patcher, _):
        tensors = generic(*((name, shapes(patcher)[name]) for name in names), **options)
        return by_hand(patcher, {name: tensor.to(patcher.load_device) for name, tensor in tensors.items()}), {}
    return case


def hook_lora(*names, **options):
    """A LoRA on these layers that the prompt brings. options: of lora_tensors.generic."""
    def case(patcher, _):
        tensors = generic(*((name, shapes(patcher)[name]) for name in names), **options)
        return patcher, {"positive": prompt(hooks=comfy.hooks.create_hook_lora(tensors, 1.0, 0.0))}
    return case


def hook_on(name, change):
    """A hook on module `name` of the diffusion model that changes its output."""
    def case(patcher, patch):
        module = patcher.model.diffusion_model.get_submodule(name)
        patch.setitem(module._forward_hooks, -1, lambda module, args, output: change(output))
        return patcher, {}
    return case


def object_patch(name, make):
    """make(object) in place of the object `name` of the diffusion model."""
    def case(patcher, _):
        patched, key = patcher.clone(), f"diffusion_model.{name}"
        patched.add_object_patch(key, make(patcher.get_model_object(key)))
        return patched, {}
    return case


def forward_of_the_class(owner, change=mixed):
    """The forward of a class of blocks with `change` on its output."""
    def case(patcher, patch):
        forward = owner.forward
        patch.setattr(owner, "forward", lambda *args, **kwargs: change(forward(*args, **kwargs)))
        return patcher, {}
    return case
