"""SVDQuant Several GPUs: a MODEL whose forwards run on several GPUs of this machine, one worker process a further GPU.

The worker processes load the same file and wait. At every forward of the MODEL process 0 sends them its inputs, and all processes run the
forward on a part of the tokens (sequence.py). A forward that other nodes have changed in a way that the workers don't know runs on one GPU
as ever, and a line of the log says why.
"""

import inspect
import json
import logging
import sys
from datetime import timedelta
from pathlib import Path

import comfy.model_management
import comfy.options
import comfy.patcher_extension
import torch
import torch.distributed as dist

from ..layers.linear import SVDQuantLinear
from ..parallel import crew
from ..parallel.alone import Lost
from . import loader, model_folder, sequence
from .attachments import SOURCE
from .fused_blocks import OVERRIDE
from .model_family import family_of
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
    if patcher.patches or patcher.injections or patcher.object_patches.keys() - {"manual_cast_dtype"}:
        raise ValueError("There are LoRAs or other patches on this MODEL, which don't travel to the other GPUs; put SVDQuant Several GPUs "
                         "right behind the loader, and bake LoRAs in with SVDQuant Quantize Model.")
    if not sequence.can_be_divided(family):
        raise ValueError(f"SVDQuant Several GPUs does not divide {family.title} models yet; use one GPU.")
    heads = sequence.heads_of(patcher.model.diffusion_model, family)
    if heads % gpus:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ValueError(f"This model has {heads} attention heads, which {gpus} GPUs can't share evenly; set gpus to one of {fitting}.")
    clone = patcher.clone()
    clone.add_wrapper_with_key(WRAPPER, KEY, Drawing(patcher, family, path, gpus))
    return clone


class Drawing:
    """The wrapper of a diffusion model's forward."""

    def __init__(self, patcher, family, path, gpus):
        self.family, self.gpus, self.unpatched, self.crew, self.said = family, gpus, patcher.patches_uuid, None, set()
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
            self.crew = crew.Crew(self.gpus, [*PROGRAM, json.dumps(self.options)], self.device)

    def __call__(self, executor, *args, **kwargs):
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "wrappers" in value)
        if (why := self.unfit(args, kwargs, options)) is not None:
            if why not in self.said:
                self.said.add(why)
                log.warning("SVDQuant Several GPUs: this runs on one GPU, since %s.", why)
            return executor(*args, **kwargs)
        self.start()
        ranks = self.crew.joined(comfy.model_management.throw_exception_if_processing_interrupted)
        try:
            ranks.exchanged(dict.fromkeys(range(1, ranks.size), (without_options(args, options), without_options(kwargs, options))))
            with sequence.divided(executor.class_obj, self.family, options, 0, ranks.size):
                result = executor(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a worker that ended leaves numbers without meaning behind
            self.crew.check()
            return result
        except BaseException as error:
            lost = isinstance(error, Exception) and self.crew.has_lost_one()
            self.crew.close()  # the workers may be anywhere in the forward
            if isinstance(error, Lost) or lost:
                raise RuntimeError("SVDQuant Several GPUs: a process of another GPU has ended in the middle of a step; its own lines in "
                                   "ComfyUI's log say why. No picture was made; run again to start new ones.") from error
            raise

    def unfit(self, args, kwargs, options):
        """Why the workers can't run this forward, as the end of a sentence; None if they can."""
        wrappers = options.get("wrappers", {}).get(WRAPPER, {})
        if self.model.current_weight_patches_uuid != self.unpatched:
            return "a LoRA or another weight patch is on the MODEL"
        if OVERRIDE in options or any(key != KEY and found for key, found in wrappers.items()):
            return "another node works on attention or on the model's forward"
        if any(options[name] for name in options.keys() - KNOWN_OPTIONS):
            return f"another node has set {min(name for name in options.keys() - KNOWN_OPTIONS if options[name])}"
        if not all(simple(value) for value in (*without_options(args, options), *without_options(kwargs, options).values())):
            return "a ControlNet or another object is an input of the model"
        if "timestep_zero" in str(kwargs.get("ref_latents_method", "")):
            return "its reference pictures have a time of their own"
        return None

    def __deepcopy__(self, memo):
        return self


def host_options():
    """The options of this ComfyUI's command line."""
    return sys.argv[1:] if comfy.options.args_parsing else []


def without_options(values, options):
    """The arguments of a forward without the transformer options, which have code in them: None stands for them."""
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if value is not options}
    return tuple(None if value is options else value for value in values)


def simple(value):
    """Whether a value can be sent to another process: tensors, numbers and texts, and lists, tuples and dicts of them."""
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
        ranks = crew.join(store, rank, size, patcher.load_device)
        family, model = family_of(patcher.model), patcher.model.diffusion_model
        while True:
            args, kwargs = ranks.exchanged({})[0]
            run(model, family, args, kwargs, rank, size, patcher.load_device)


def run(model, family, args, kwargs, rank, size, device):
    """One forward in a worker. args, kwargs: of process 0, from without_options; None in place of the transformer options."""
    args, kwargs = moved(args, device), moved(kwargs, device)
    options = {}
    with sequence.divided(model, family, options, rank, size):
        try:
            # The transformer options are the last positional argument, where they are one.
            model(*(args[:-1] if args and args[-1] is None else args), **kwargs, transformer_options=options)
        except sequence.Finished:
            pass


def moved(value, device):
    """Nested tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(each, device) for name, each in value.items()}
    return type(value)(moved(each, device) for each in value) if isinstance(value, (list, tuple)) else value
