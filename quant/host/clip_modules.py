"""The modules of a CLIP: its encoders, what of them is packed, and a copy of them that shares nothing with the original.

ComfyUI's CLIP has a `cond_stage_model`. It holds a comfy.sd1_clip.SDClipModel for each encoder, such as clip_l and t5xxl, and each of these
a `transformer`, into which a file of the encoder is loaded. An encoder's text stack is the largest of its ModuleLists; vision towers, which
some encoders have for models that edit images, are smaller. The linears of the text stack are packed in 4 bits, and the table of the
tokens' embeddings in 8. Everything else is small, or no prompt uses it, and stays as it is.
"""

from dataclasses import dataclass

import comfy.ops
import comfy.sd1_clip
import torch

from ..layers import layout
from ..layers.packed_embedding import EmbeddingSpec
from .operations import Operations

LARGE = 10**9  # parameters of a text stack from which an encoder is worth packing: CLIP-L has 0.09, CLIP-G 0.6, T5-XXL 4.6 thousand million
TRANSFORMER = "transformer"
DTYPE = torch.bfloat16  # the scales' type: it has the range of float32, in which the encoders compute
OUTPUTS = 16  # the W4A16 kernel computes outputs in multiples of this
# What ComfyUI's patchers and its dynamic VRAM set on a module of a loaded model.
OF_LOADING = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function", "prev_comfy_cast_weights",
              "comfy_patched_weights", "comfy_force_cast_weights", "seed_key", "_pin_state", "_prefetch", "_comfy_graph")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
         "_load_state_dict_pre_hooks")


@dataclass(frozen=True)
class Encoder:
    """One encoder of a CLIP.

    name: of its SDClipModel in the cond_stage_model, as t5xxl; transformer: its module; path: of the transformer; stack: the name of the
    text stack within the transformer; specs: {name within the transformer: LayerSpec or EmbeddingSpec} of all that can be packed; misfits:
    {name of a linear of the stack: why it can't be packed}; parameters: number of the stack's.
    """

    name: str
    transformer: torch.nn.Module
    path: str
    stack: str
    specs: dict
    misfits: dict
    parameters: int

    @property
    def kind(self):
        """The class of the transformer, by which a file says what it holds."""
        return class_name(self.transformer)


def class_name(module):
    return f"{type(module).__module__}.{type(module).__qualname__}"


def encoders(model):
    """[Encoder] of a cond_stage_model, in its order."""
    return [encoder(name, getattr(module, TRANSFORMER)) for name, module in model.named_modules()
            if isinstance(module, comfy.sd1_clip.SDClipModel) and hasattr(module, TRANSFORMER)]


def encoder(name, transformer):
    """The Encoder called `name`, of a transformer."""
    stacks = {path: stack for path, stack in transformer.named_modules() if isinstance(stack, torch.nn.ModuleList)}
    count = {path: sum(p.numel() for p in stack.parameters()) for path, stack in stacks.items()}
    stack = max(count, key=count.get, default=None)
    specs, misfits = {}, {}
    for path, linear in stacks[stack].named_modules(prefix=stack) if stack else ():
        if is_linear(linear):
            n, k = linear.out_features, linear.in_features
            try:
                specs[path] = layout.LayerSpec(layout.AWQ, k, n, bias=linear.bias is not None, dtype=DTYPE)
            except ValueError as error:
                misfits[path] = str(error)
            else:
                if n % OUTPUTS:
                    misfits[path] = f"has {n} outputs, which is not a multiple of {OUTPUTS}"
                    del specs[path]
    table = transformer.get_input_embeddings() if hasattr(transformer, "get_input_embeddings") else None
    if is_embedding(table):
        path = next(path for path, found in transformer.named_modules() if found is table)
        specs[path] = EmbeddingSpec(table.embedding_dim, table.num_embeddings, DTYPE)
    return Encoder(name, transformer, ".".join(filter(None, (name, TRANSFORMER))), stack or "", specs, misfits, count.get(stack, 0))


def is_linear(module):
    """Whether a module is a linear of one of ComfyUI's operations classes, with any format of its weight and no forward of its own."""
    return (isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")
            and getattr(getattr(module, "weight", None), "ndim", 0) == 2 and has_plain_forward(module))


def is_embedding(module):
    """Whether a module is an embedding of one of ComfyUI's operations classes."""
    return isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "num_embeddings")


def has_plain_forward(module):
    """Whether a module's forward is that of ComfyUI's operations, and no subclass's."""
    return type(module).forward.__module__ == "comfy.ops"


def packed(spec, module):
    """A packed layer for a LayerSpec or EmbeddingSpec in place of `module`, with parameters on the meta device."""
    return Operations.PackedEmbedding.of(module, spec) if isinstance(spec, EmbeddingSpec) else Operations.TokenLinear(spec)


def dense(module, dtype):
    """An ordinary layer of ComfyUI's in place of a linear or an embedding, with parameters in `dtype` on the meta device."""
    if is_embedding(module):
        return Operations.Embedding(module.num_embeddings, module.embedding_dim, dtype=dtype, device="meta")
    return Operations.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype, device="meta")


def swap(model, path, module):
    """Put `module` in the place of the one at `path`."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def skeleton(model):
    """A copy of a tree of modules with parameters on the meta device, and with copies of its buffers on the CPU. It has none of the hooks
    and of what loading has set on the modules."""
    return _copied(model, {})


def _copied(value, memo):
    """A copy of a module's attribute: of the modules in it, wherever lists, tuples and dicts hold them."""
    if isinstance(value, torch.nn.Module):
        if id(value) not in memo:
            memo[id(value)] = copy = object.__new__(type(value))
            copy.__dict__.update(_attributes(value, memo))
        return memo[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_copied(entry, memo) for entry in value)
    return {key: _copied(entry, memo) for key, entry in value.items()} if type(value) is dict else value


def _attributes(module, memo):
    own = {name: value for name, value in vars(module).items() if name not in OF_LOADING and not name.startswith("_v")}
    meta = {name: None if p is None else torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
            for name, p in own.pop("_parameters").items()}
    buffers = {name: None if buffer is None else buffer.detach().to("cpu", copy=True) for name, buffer in own.pop("_buffers").items()}
    children = {name: _copied(child, memo) for name, child in own.pop("_modules").items()}
    hooks = {name: type(own.pop(name))() for name in HOOKS if name in own}
    return {name: _copied(value, memo) for name, value in own.items()} | hooks | {
        "_parameters": meta, "_buffers": buffers, "_modules": children,
        "_non_persistent_buffers_set": set(module._non_persistent_buffers_set)}
