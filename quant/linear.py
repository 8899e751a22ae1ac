"""The two packed linear layers. Parameters as layout.py lists them; forward is one op."""

import torch

from ..cuda import ops


class PackedLinear(torch.nn.Module):
    """What both layers share: the parameters of a LayerSpec, under the names of the file.

    The parameters are allocated on `device`; "meta" allocates nothing, until load_state_dict(assign=True) puts the
    file's own tensors in. They may lie on another device than the input (ComfyUI's offloading): forward brings each
    to the input.
    """

    def __init__(self, spec, device="meta"):
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.register_parameter("bias", None)
        for name, (shape, dtype) in spec.tensors().items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device),
                                                             requires_grad=False))

    def at(self, x):
        """{name: the parameter on x's device}."""
        return {name: None if p is None else p.to(x.device, non_blocking=True) for name, p in self._parameters.items()}

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.spec.format}, rank={self.spec.rank}"


class SVDQuantLinear(PackedLinear):
    """W4A4 with a low-rank branch: x (..., K) -> (..., N).

    act_bits: 4, SVDQuant as published, or 8, the same weights with int8 activations.
    """

    act_bits = 4

    def forward(self, x):
        p = self.at(x)
        return ops.svdquant_linear(x, p["weight"], p["weight_scale"], p["weight_proj_down"], p["weight_proj_up"],
                                   p["weight_smooth_factor"], p["bias"], self.spec.unsigned_from, self.act_bits)


class AWQLinear(PackedLinear):
    """W4A16, for the modulation layers, which see one row a picture: x (..., K) -> (..., N)."""

    def forward(self, x):
        p = self.at(x)
        return ops.awq_linear(x, p["weight"], p["weight_scale"], p["weight_zeros"], p["bias"])
