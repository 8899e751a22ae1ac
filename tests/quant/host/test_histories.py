"""Random histories of clones of one quantized model against ComfyUI's patcher: the same state draws the same bits, whatever came before.

A state is the LoRAs of a clone, in their order, with the LoRA of a hook. The reference is a model of its own, loaded whole. Hypothesis
leaves out some of the rules in each history, so that every rule draws, and not one alone.
"""

import gc

import comfy.hooks
import comfy.model_management
import comfy.sample
import pytest
import torch
from comfyui_svdquant.quant.checkpoint import native
from comfyui_svdquant.quant.host import loader
from comfyui_svdquant.quant.host.saving import stored_tensors
from comfyui_svdquant.quant.layers.linear import PackedLinear
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule, run_state_machine_as_test

from ..comfy_models import LATENT, prompts
from ..lora_tensors import generic, load_lora, random, shapes
from ..packed_flux import packed_flux

FIRST, HISTORIES, MANY, STEPS = 20, 180, 2000, 8
BUDGETS = (0.0, 0.2, 0.5, 0.9, 1.0, 1.5)  # parts of the model's size
STRENGTHS = (1.0, -0.5)
FLAGS = ("comfy_patched_weights", "prev_comfy_cast_weights", "streamed")


def loras(patcher):
    """One on all packed layers, one with their biases and everything in 16 bits, and one on a layer alone with a larger rank."""
    sizes = list(shapes(patcher).items())
    biased = generic(*sizes, rank=3) | {f"diffusion_model.{name}.diff_b": random(n, seed=5) for name, (n, _) in sizes}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        if patcher.packed_at(f"diffusion_model.{name.rpartition('.')[0]}.weight") is None:  # of linears and norms, in ComfyUI's naming
            target = f"{name.removesuffix('.weight')}.diff" if not name.endswith(".bias") else f"{name.removesuffix('.bias')}.diff_b"
            biased[f"diffusion_model.{target}"] = 0.1 * random(*parameter.shape, seed=6)
    return generic(*sizes), biased, generic(sizes[0], rank=20)


class World:
    """The model under test, a model for the reference, and what the reference has drawn: {(LoRAs, LoRA of the hook): latent}."""

    def __init__(self, path):
        self.path, self.reference = path, loader.load_model(path)
        self.loras, self.drawn = loras(self.reference), {}
        self.stored = {name: tensor.clone() for name, tensor in stored_tensors(self.reference).items()}
        self.modules = module_states(self.reference)
        self.renew()

    def renew(self):
        """A new model for the histories, after one that has failed."""
        self.subject, self.sound = loader.load_model(self.path), True

    def expected(self, state, hook):
        if (state, hook) not in self.drawn:
            patcher = self.reference
            for lora, strength in state:
                patcher = load_lora(patcher, self.loras[lora], strength)
            self.drawn[state, hook] = draw(patcher, self.hooks(hook), 2.0)
            self.reference.detach()
        return self.drawn[state, hook]

    def hooks(self, hook):
        return None if hook is None else comfy.hooks.create_hook_lora(self.loras[hook], 0.5, 0)


def row_scale(module):
    """The numbers of a layer's row scale, or None. A layer that was on a GPU has found them anew."""
    known = getattr(module, "_row_scale", None)
    return known and known.value.tolist()


def module_states(patcher):
    """What patches, hooks and offloading set on modules, and where the parameters are."""
    found = {}
    for name, module in patcher.model.named_modules():
        found[name] = (
            [getattr(module, flag, None) for flag in FLAGS], [bool(getattr(module, f"{part}_function", ())) for part in ("weight", "bias")],
            module.lora_branch if isinstance(module, PackedLinear) else None, sorted(child for child, _ in module.named_children()),
            len(module._forward_hooks) + len(module._forward_pre_hooks), "forward" in vars(module), row_scale(module),
            {part: (parameter.device, parameter.dtype, parameter.shape) for part, parameter in module.named_parameters(recurse=False)})
    return found


def put_on(patcher, part):
    """Load as ComfyUI's load_models_gpu does, with a budget of a part of the model's size; None: as much as is loaded."""
    extra = 0 if part is None else part * patcher.model_size() - patcher.loaded_size()
    patcher.partially_load(patcher.load_device, extra or 0.1)


def draw(patcher, hooks, part):
    conditioning = prompts(1)
    if hooks is not None:
        conditioning = comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: put_on(patcher, part))
        noise = comfy.sample.prepare_noise(LATENT["samples"], 5)
        return comfy.sample.sample(patcher, noise, 1, 1.0, "euler", "simple", conditioning, conditioning, LATENT["samples"],
                                   disable_pbar=True, seed=5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "flux.safetensors")
    native.save(path, *packed_flux(), {"preset": "data-free"}, "flux")
    with torch.inference_mode():
        return World(path)


def histories(world):
    """The state machine of a World."""

    hooks = st.lists(st.sampled_from((None, 0, 1)), max_size=2)  # one for each picture that is drawn

    class Histories(RuleBasedStateMachine):
        clones = Bundle("clones")

        @initialize(target=clones)
        def begin(self):
            if not world.sound:
                world.renew()
            self.current, world.sound = None, False
            biased = load_lora(world.subject, world.loras[1], STRENGTHS[0])
            return multiple((world.subject.clone(), ()), (biased, ((1, STRENGTHS[0]),)))

        def switch(self, one):
            """As ComfyUI does before it loads another clone."""
            if self.current is not None and self.current[0] is not one[0]:
                self.current[0].detach(unpatch_all=False)
            self.current = one

        @rule(target=clones, one=clones)
        def clone(self, one):
            patcher, state = one
            return patcher.clone(), state

        @rule(target=clones, one=clones, lora=st.integers(0, 2), strength=st.sampled_from(STRENGTHS))
        def add_lora(self, one, lora, strength):
            patcher, state = one
            if len(state) == 2:
                return one
            return load_lora(patcher, world.loras[lora], strength), (*state, (lora, strength))

        def draws(self, hooks, part=None):
            """What the current clone draws under each of the hooks, loaded with a part of its size, is what the reference draws."""
            for hook in hooks:
                found = draw(self.current[0], world.hooks(hook), part)
                assert torch.equal(found, world.expected(self.current[1], hook)), f"{self.current[1]} with hook {hook} draws something else"

        @rule(one=clones, parts=st.lists(st.sampled_from(BUDGETS), min_size=1, max_size=3), hooks=hooks)
        def sample(self, one, parts, hooks):
            self.switch(one)
            for part in parts:
                self.draws(hooks or [None], part)

        @rule(one=clones, part=st.sampled_from(BUDGETS), hooks=hooks)
        def load(self, one, part, hooks):
            self.switch(one)
            put_on(one[0], part)
            self.draws(hooks)

        @rule(part=st.sampled_from(BUDGETS), hooks=hooks)
        def make_room(self, part, hooks):
            if self.current is not None:
                patcher = self.current[0]
                before = patcher.loaded_size()
                freed = patcher.partially_unload(patcher.offload_device, part * patcher.model_size())
                assert 0 <= freed <= before + 1
                self.draws(hooks)

        @rule()
        def unload(self):
            if self.current is not None:
                self.current[0].detach()
                self.current = None

        @rule()
        def save(self):
            found = stored_tensors(world.subject)
            assert found.keys() == world.stored.keys()
            assert all(torch.equal(tensor.cpu(), world.stored[name].cpu()) for name, tensor in found.items())

        @invariant()
        def only_the_patches_of_the_current_clone_are_on_the_model(self):
            attached = world.subject.model.svdquant_attached
            assert attached is None or self.current is None or attached == self.current[0].patches_uuid
            assert not world.subject.model.svdquant_unhooked, "a hook's branch is left on a layer"

        def teardown(self):
            if self.current is not None:
                self.draws([None])
            world.subject.detach()
            assert module_states(world.subject) == world.modules, "a module is not as it was"
            assert world.subject.loaded_size() == 0 and not world.subject.backup and not world.subject.hook_backup
            self.save()
            world.sound = True

    return Histories


def run(world, count, steps=STEPS):
    with torch.inference_mode():
        run_state_machine_as_test(lambda: histories(world)(), settings=settings(
            max_examples=count, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)))


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.timeout(1200)
def test_the_same_state_draws_the_same_bits_after_any_history(world):
    run(world, FIRST)  # caches have been filled
    before = live_tensors()
    run(world, HISTORIES)
    assert live_tensors() - before < 1000  # of the pictures of new states, and of the caches


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_the_same_state_draws_the_same_bits_after_many_histories(world):
    run(world, MANY, 2 * STEPS)
