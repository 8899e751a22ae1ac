"""Settings of a MODEL that hold its diffusion model, and therefore can't be carried over to the quantized model."""

import dataclasses
import functools
import gc
import itertools
import re
import unittest.mock
import weakref

import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfyui_svdquant.quant.host import carried, quantize
from comfyui_svdquant.quant.quantizer import presets

from ..comfy_models import Progress
from ..conftest import load
from .test_other_nodes import newer, node, prompts

pytestmark = pytest.mark.usefixtures("inference_mode")


# --- the walk ------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.Linear(4, 4)

    def wrapper(self, run, arguments):
        return run(**arguments)


@dataclasses.dataclass
class State:
    previous: object = None


@dataclasses.dataclass(slots=True)
class Slotted:
    held: object


class Slots:
    __slots__ = "held"


def closure(held):
    return lambda *_: held


def late_closure(held):
    def function():
        return later  # not assigned while the closure is on the MODEL

    if held is None:
        later = 1
    return function


def default(held):
    def function(x, held=held, *, other=3):
        return x
    return function


def slots(held):
    found = Slots()
    found.held = held
    return found


def wrapped(held):
    @functools.wraps(closure(held))
    def function():
        return None
    return function


def cycle(held):
    first, second = State(), State(held)
    first.previous = [second, first]
    second.other = first
    return first


def deep(held):
    for _ in range(carried.MAX_DEPTH - 2):
        held = [held]
    return held


HOLDERS = {
    "itself": lambda held: held, "a closure": closure, "a closure in a closure": lambda held: closure(closure(held)), "a default": default,
    "a partial": lambda held: functools.partial(print, held), "a partial's function": lambda held: functools.partial(closure(held), 1),
    "a keyword of a partial": lambda held: functools.partial(print, end=held), "an attribute of a function": wrapped,
    "a dataclass": State, "a dataclass with slots": Slotted, "slots": slots, "a list": lambda held: [1, [held]],
    "a tuple in a dict": lambda held: {"a": ("b", {"c": held})}, "a key": lambda held: {held: 1}, "a set": lambda held: {held},
    "a weak reference": lambda held: weakref.ref(held), "a weak key": lambda held: weakref.WeakKeyDictionary({held: 1}),
    "an iterator": lambda held: itertools.cycle([held]), "a mock's patch": lambda held: unittest.mock.patch.multiple(held, forward=1),
    "a module": lambda held: torch.nn.Sequential(held) if isinstance(held, torch.nn.Module) else closure(held), "a cycle": cycle,
    "many steps": deep,
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("part", ["the model", "a block"])
def test_every_kind_of_holder_reaches_its_module(holder, part):
    model = Model()
    held, other = (found if part == "the model" else found.block for found in (model, Model()))
    way = carried.reaches({"its wrapper": HOLDERS[holder](held)}, list(model.modules()))
    assert way is not None and way.startswith("its wrapper") and "\n" not in way
    assert carried.reaches({"its wrapper": HOLDERS[holder](other)}, list(model.modules())) is None


@pytest.mark.parametrize("held", [lambda model: model.wrapper, lambda model: model.block.forward, lambda model: model.block.weight,
                                  lambda model: model.block.weight.data[1:], lambda model: model.parameters(),
                                  lambda model: model.block.__call__, lambda model: model.__dir__])
def test_methods_and_weights_reach_their_module(held):
    model, other = Model(), Model()
    assert carried.reaches({"x": closure([held(model)])}, list(model.modules())) is not None
    assert carried.reaches({"x": closure([held(other)])}, list(model.modules())) is None


def test_the_path_is_described_in_words():
    model = Model()
    found = {"its model_function_wrapper": functools.partial(closure(State(model)), 1)}
    assert carried.reaches(found, [model]) == "its model_function_wrapper (its function) (its variable held).previous"


def test_the_walk_ends():
    endless, last = [], None
    for _ in range(carried.MAX_DEPTH + 10):
        last = [last]
    endless.append(endless)
    assert carried.reaches({"x": endless, "y": last, "z": late_closure(1)}, [Model()]) is None


# --- on a MODEL ----------------------------------------------------------------------------------------------------


def step_cache(patcher, diffusion_model):
    """A wrapper that replaces the diffusion model's forward during a call, as TeaCache does."""
    cached = patcher.clone()

    def wrapper(apply_model, arguments):
        with unittest.mock.patch.multiple(diffusion_model, forward_orig=diffusion_model.forward_orig):
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    cached.set_model_unet_function_wrapper(wrapper)
    return cached


def placed(where):
    """Put `thing` on a clone of the MODEL."""
    def put(patcher, thing):
        patched = patcher.clone()
        if where == "wrapper":
            patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", closure(thing))
        elif where == "callback":
            patched.add_callback(CallbacksMP.ON_PRE_RUN, closure(thing))
        elif where == "attachment":
            patched.set_attachments("cache", State(thing))
        elif where == "attention patch":
            patched.set_model_attn1_patch(closure(thing))
        elif where == "block replacement":
            patched.set_model_patch_replace(closure(thing), "dit", "double_block", 0)
        elif where == "object patch":
            sampling = type(patched.model.model_sampling)(patched.model.model_config)
            sampling.cache = [thing]
            patched.add_object_patch("model_sampling", sampling)
        elif where == "guidance":
            patched.set_model_sampler_post_cfg_function(closure(thing))
        else:
            patched.set_additional_models("cache", [thing])
        return patched
    return put


PLACES = ["wrapper", "callback", "attachment", "attention patch", "block replacement", "object patch", "guidance"]


@pytest.mark.parametrize("put", [step_cache, *map(placed, PLACES)], ids=["step cache", *PLACES])
def test_settings_that_reach_the_model_are_refused(plain, put):
    carried.check_carried(put(plain, Model()))
    with pytest.raises(ValueError, match=r"^A node on this MODEL, [^\n]+ \(its [^\n]+\), [^\n]+; put that node behind SVDQuant Q[^\n]+\.$"):
        carried.check_carried(put(plain, plain.model.diffusion_model))


@pytest.mark.parametrize("thing", [lambda patcher: patcher, lambda patcher: patcher.model, lambda patcher: patcher.model.apply_model])
def test_an_object_that_holds_the_base_model_is_refused(plain, thing):
    with pytest.raises(ValueError, match=re.escape("holds parts of the 16-bit model (its diffusion_model wrapper['cache']")):
        carried.check_carried(placed("wrapper")(plain, thing(plain)))


def test_an_unrelated_additional_model_is_carried(pair_files, plain):
    carried.check_carried(placed("additional model")(plain, load(pair_files[0])))
    with pytest.raises(ValueError, match="its additional model cache"):
        carried.check_carried(placed("additional model")(plain, plain.clone()))


@pytest.mark.parametrize(("module", "name", "options"), [
    ("slg", "SkipLayerGuidanceDiT", {"double_layers": "0", "single_layers": "0", "start_percent": 0.0, "end_percent": 1.0}),
    ("fresca", "FreSca", {}), ("easycache", "EasyCacheNode", {}), ("easycache", "LazyCacheNode", {}), ("rope", "ScaleROPE", {}),
    ("context_windows", "ContextWindowsManualNode", {"dim": 2, "context_length": 4, "context_overlap": 2,
                                                     "context_schedule": "standard_static"}),
    ("differential_diffusion", "DifferentialDiffusion", {}), ("model_advanced", "ModelSamplingFlux", {}),
    ("model_advanced", "ModelComputeDtype", {"dtype": "bf16"}), ("model_advanced", "RescaleCFG", {}),
    ("perpneg", "PerpNeg", {"empty_conditioning": prompts(3)[2:]}), pytest.param("nag", "NAGuidance", {}, marks=newer)])
def test_comfyuis_own_nodes_are_carried(plain, module, name, options):
    carried.check_carried(node(module, name, model=plain, **options))


def test_the_source_is_collected_if_nothing_reaches_it(pair_files):
    patched = placed("wrapper")(load(pair_files[0]), lambda run, *args, **kwargs: run(*args, **kwargs))
    patched = placed("attachment")(patched, Model())
    carried.check_carried(patched)
    source = weakref.ref(patched.model.diffusion_model)
    quantized_model, _ = quantize.quantize(patched, presets.make_recipe("data-free", 16), None, None, 2, 0, Progress())
    del patched
    gc.collect()
    assert source() is None and quantized_model.get_attachment("cache")
    assert quantized_model.get_wrappers(WrappersMP.DIFFUSION_MODEL, "cache")


def test_a_step_cache_is_refused_before_the_run(plain):
    progress = Progress()
    with pytest.raises(ValueError, match="^A node on this MODEL, such as a step cache, [^\n]+ behind SVDQuant Quantize Model\\.$"):
        quantize.quantize(step_cache(plain, plain.model.diffusion_model), presets.make_recipe("data-free", 16), None, None, 2, 0, progress)
    assert not progress.texts
