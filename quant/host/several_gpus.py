"""SVDQuant Several GPUs: a MODEL whose forwards run on several GPUs of this machine, one worker process a further GPU.

The worker processes load the same file and wait. At every forward of the MODEL process 0 sends them its inputs, and its LoRAs where they
have changed, and all processes run the forward on a part of the tokens (sequence.py). A forward that other nodes have changed in a way that
the workers can't know runs on one GPU as ever, and a line of the log says why.
"""

import inspect
import json
import logging
import sys
import uuid
from datetime import timedelta
from pathlib import Path

import comfy.model_management
import comfy.options
import comfy.patcher_extension
import torch
import torch.distributed as dist
from comfy.weight_adapter import WeightAdapterBase

from ..layers.linear import SVDQuantLinear
from ..parallel import crew, ranks
from ..parallel.alone import Lost
from . import loader, model_folder, sequence, step_graphs
from .attachments import SOURCE
from .divided_steps import DividedSteps
from .fused_blocks import OVERRIDE
from .model_family import family_of
from .packed_layers import PREFIX
from .step_graphs import KNOWN_OPTIONS, SIMPLE

KEY = "svdquant_several_gpus"
WRAPPER = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
PROGRAM = [sys.executable, str(Path(__file__).resolve().parents[1] / "parallel" / "draw.py")]
JOIN = timedelta(minutes=10)

log = logging.getLogger(__name__)


def several_gpus(patcher, gpus):
    """A clone of a MODEL of SVDQuant Load Model that runs on this many GPUs. Raises ValueError if it can't."""
    family = family_of(patcher.model)
    name = patcher.get_attachment(SOURCE)
    path = name and model_folder.find(name)
    if family is None or path is None:
        raise ValueError("SVDQuant Several GPUs takes a MODEL from SVDQuant Load Model, since the other GPUs load the same file; save this "
                         "MODEL, load it, and put this node right behind the loader.")
    if part := replaced_part(patcher):
        raise ValueError(f"Another node has changed a part of this MODEL ({part}), and the other GPUs can't have that; put SVDQuant "
                         "Several GPUs right behind the loader.")
    if not sequence.can_be_divided(family):
        raise ValueError(f"SVDQuant Several GPUs does not divide {family.title} models yet; use one GPU.")
    heads = sequence.heads_of(patcher.model.diffusion_model, family)
    if heads % gpus:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ValueError(f"This model has {heads} attention heads, which {gpus} GPUs can't share evenly; set gpus to one of {fitting}.")
    clone = patcher.clone()
    clone.add_wrapper_with_key(WRAPPER, KEY, Drawing(patcher, family, path, gpus))
    return clone


def replaced_part(patcher):
    """What a node has changed in a MODEL's model other than its weights, by name; None if there is nothing."""
    changes = (name for name in (*patcher.object_patches, *patcher.weight_wrapper_patches) if name.startswith(PREFIX[:-1]))
    return next(changes, None) or next((str(name) for name, found in patcher.injections.items() if found), None)


class Drawing:
    """The wrapper of a diffusion model's forward."""

    def __init__(self, patcher, family, path, gpus):
        self.family, self.gpus, self.crew, self.said = family, gpus, None, set()
        self.sent = None  # the patches_uuid of the weight patches that the workers have
        self.steps = None  # the DividedSteps of the crew
        self.model, self.device = patcher.model, patcher.load_device
        bits = {layer.act_bits for layer in patcher.model.diffusion_model.modules() if isinstance(layer, SVDQuantLinear)}
        self.options = {"comfyui": str(Path(inspect.getfile(comfy.options)).parents[1]), "options": host_options(), "path": path,
                        "act_bits": max(bits, default=0),
                        "compute_dtype": str(patcher.model.get_dtype()).removeprefix("torch.")}
        self.start()

    def start(self):
        if self.crew is not None and self.crew.has_lost_one(0):  # between two pictures
            self.crew.close()
        if self.crew is None or self.crew.closed:
            self.crew, self.sent = crew.Crew(self.gpus, [*PROGRAM, json.dumps(self.options)], self.device), None

    def __call__(self, executor, *args, **kwargs):
        bound = inspect.signature(executor.class_obj.forward).bind(*args, **kwargs)
        if (why := self.unfit(bound.arguments)) is not None:
            if why not in self.said:
                self.said.add(why)
                log.warning("SVDQuant Several GPUs: this runs on one GPU, since %s.", why)
            return executor(*args, **kwargs)
        self.start()
        every = self.crew.joined(comfy.model_management.throw_exception_if_processing_interrupted)
        try:
            patcher = self.model.current_patcher
            patches = None if patcher.patches_uuid == self.sent else patcher.patches
            if self.steps is None or self.steps.every is not every:
                self.steps = DividedSteps(every, self.family)
            with self.crew.step():
                result = self.steps.draw(executor.class_obj, executor, bound.arguments, patches)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # a worker that ended leaves numbers without meaning behind
            self.sent = patcher.patches_uuid
            self.crew.check()
            return result
        except BaseException as error:
            lost = isinstance(error, Exception) and self.crew.has_lost_one()
            self.crew.close()  # the workers may be anywhere in the forward
            step_graphs.release(executor.class_obj)
            if isinstance(error, Lost) or lost:
                raise RuntimeError("SVDQuant Several GPUs: a process of another GPU has ended in the middle of a step; its own lines in "
                                   "ComfyUI's log say why. No picture was made; run again to start new ones.") from error
            raise

    def unfit(self, arguments):
        """Why the workers can't run a forward with {name: argument}, as the end of a sentence; None if they can."""
        options, patcher = arguments.get("transformer_options", {}), self.model.current_patcher
        wrappers = options.get("wrappers", {}).get(WRAPPER, {})
        if patcher is None or patcher.model is not self.model or self.model.current_weight_patches_uuid != patcher.patches_uuid:
            return "another node has loaded the model by itself"
        if patcher.current_hooks is not None:
            return "hooks change the model's weights while it draws"
        if patcher.patches_uuid != self.sent and not all(simple(entry) for found in patcher.patches.values() for entry in found):
            return "another node's LoRA or merge brings code of its own"
        if part := replaced_part(patcher):
            return f"another node has changed a part of the model, {part}"
        if OVERRIDE in options or any(key != KEY and found for key, found in wrappers.items()):
            return "another node works on attention or on the model's forward"
        if any(options[name] for name in options.keys() - KNOWN_OPTIONS):
            return f"another node has set {min(name for name in options.keys() - KNOWN_OPTIONS if options[name])}"
        if not all(simple(value) for name, value in arguments.items() if name != "transformer_options"):
            return "another node's object is an input of the model"
        if "timestep_zero" in str(arguments.get("kwargs", {}).get("ref_latents_method", "")):
            return "its reference pictures have a time of their own"
        return None

    def __deepcopy__(self, memo):
        return self


def host_options():
    """The options of this ComfyUI's command line."""
    return sys.argv[1:] if comfy.options.args_parsing else []


def simple(value):
    """Whether a value can be sent to another process: tensors, numbers and texts, lists, tuples and dicts of them, and ComfyUI's LoRAs."""
    if isinstance(value, WeightAdapterBase):
        return type(value).__module__.partition(".")[0] == "comfy" and simple(value.weights)
    if isinstance(value, (list, tuple)):
        return all(map(simple, value))
    if isinstance(value, dict):
        return all(map(simple, value.values()))
    return isinstance(value, (torch.Tensor, *SIMPLE))


# --- A worker -----------------------------------------------------------------------------------------------------------


def serve(options, rank, size, port):
    """Load the model and run forwards as process 0 asks, until the standard input is closed."""
    store = dist.TCPStore("127.0.0.1", port, size, False, timeout=JOIN)
    with torch.inference_mode():
        patcher = loader.load_model(options["path"], getattr(torch, options["compute_dtype"]), options["act_bits"])
        comfy.model_management.load_models_gpu([patcher])
        store.set(crew.READY.format(rank), "1")
        steps = DividedSteps(crew.join(store, rank, size, patcher.load_device), family_of(patcher.model))
        while True:
            if (found := steps.followed()) is None:
                continue
            announced, (arguments, patches, live) = found
            if patches is not None:
                steps.recordings.clear()
                patcher = patched(patcher, patches)
            steps.follow(announced, patcher.model.diffusion_model, moved(arguments, patcher.load_device), live)


def patched(patcher, patches):
    """The MODEL with these weight patches in place of its own, loaded."""
    clone = patcher.clone()
    clone.patches, clone.patches_uuid = moved(patches, patcher.offload_device), uuid.uuid4()
    comfy.model_management.load_models_gpu([clone])
    return clone


def moved(value, device):
    """A value of process 0 with its tensors on `device`."""
    data, tensors = ranks.parted(value)
    return ranks.joined(data, [tensor.to(device) for tensor in tensors])
