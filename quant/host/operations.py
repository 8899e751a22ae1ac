"""The operations class: ComfyUI's own, plus the packed layers."""

import comfy.model_management
import comfy.ops
import torch

from ..layers import layout
from ..layers.linear import AWQLinear, NVFP4Linear, SVDQuantLinear
from ..layers.packed_embedding import PackedEmbedding
from ..layers.packed_mlp import PackedMLP
from ..layers.token_linear import TokenLinear
from . import malloc_graph

malloc_graph.install()


def patched_in(device):
    """The type in which ComfyUI adds patches to the parameters of a layer that is loaded on `device`: newer versions say it."""
    named = getattr(comfy.model_management, "lora_compute_dtype", None)
    return torch.float32 if named is None else named(device)


class Operations(comfy.ops.manual_cast):
    """ComfyUI gets this class as a model's custom_operations. Every 16-bit layer stays ComfyUI's own. The packed layers inherit
    CastWeightBiasOp, by which ComfyUI's model patcher recognizes a layer that can run while its weights are on another device."""

    # With Dynamic VRAM, ComfyUI's linears and embeddings have no parameters until they are loaded, except in classes with a
    # _load_from_state_dict of their own. Models are built on the meta device here, where parameters take no memory, and filled by name.
    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)

    class Embedding(comfy.ops.manual_cast.Embedding):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)

    class Packed(comfy.ops.CastWeightBiasOp):
        comfy_cast_weights = True

        def at(self, x):
            # An offloaded layer applies patches of its bias here; patches of the packed weight are in self.lora_branch.
            p = super().at(x)
            if self.bias_function:
                bias = p["bias"].to(patched_in(x.device), copy=True)  # the functions work in place
                for function in self.bias_function:
                    bias = function(bias)
                p["bias"] = bias.to(p["bias"].dtype)
            return p

        def forward(self, x):
            comfy.ops.run_every_op()  # honours Cancel
            return super().forward(x)

        def add_gated(self, x, residual, gate):
            comfy.ops.run_every_op()
            return super().add_gated(x, residual, gate)

    class SVDQuantLinear(Packed, SVDQuantLinear):
        pass

    class NVFP4Linear(Packed, NVFP4Linear):
        pass

    class AWQLinear(Packed, AWQLinear):
        pass

    class TokenLinear(Packed, TokenLinear):
        pass

    class PackedEmbedding(PackedEmbedding, comfy.ops.CastWeightBiasOp):  # the first has its own weight_function
        comfy_cast_weights = True

    class PackedMLP(PackedMLP):
        def fused(self, x):
            comfy.ops.run_every_op()
            return super().fused(x)

    @classmethod
    def packed(cls, spec):
        """A packed layer for a LayerSpec, with parameters on the meta device."""
        return {layout.AWQ: cls.AWQLinear, layout.NVFP4: cls.NVFP4Linear}.get(spec.format, cls.SVDQuantLinear)(spec)
