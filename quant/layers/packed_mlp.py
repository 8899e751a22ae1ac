"""An MLP's two packed layers as one op."""

import torch
from torch.nn.modules import module as module_hooks

from ...cuda import block_ops, mlp
from .linear import SVDQuantLinear, operands, untouched


class PackedMLP(torch.nn.Sequential):
    """A Sequential of fc1, which also applies the GELU, an Identity in place of the GELU, and fc2. It is one op if both layers are W4A4 and
    nothing else happens between them; otherwise they run one after the other."""

    def forward(self, x):
        return self.fused(x) if self.fuses(x.device) else super().forward(x)

    def add_gated(self, x, residual, gate):
        """As PackedLinear.add_gated: the last layer's."""
        *before, last = self._modules.values()
        if (self.fuses(x.device) or not untouched(self) or not isinstance(last, SVDQuantLinear) or module_hooks._global_forward_hooks
                or module_hooks._global_forward_pre_hooks):
            return None
        for module in before:
            x = module(x)
        z = last.add_gated(x, residual, gate)
        return block_ops.gated_residual(residual, last(x).to(residual.dtype), gate) if z is None else z

    def fuses(self, device):
        """Whether the layers in their present state are one op on `device`."""
        if len(self._modules) != 3:
            return False
        first, between, second = self._modules.values()
        return (isinstance(first, SVDQuantLinear) and isinstance(second, SVDQuantLinear) and isinstance(between, torch.nn.Identity)
                and first.bits(device) == second.bits(device) == 4 and mlp.pays(device)
                and first.gelu_from == 0 and second.gelu_from is None
                and untouched(first) and untouched(between) and untouched(second)
                and not module_hooks._global_forward_hooks and not module_hooks._global_forward_pre_hooks)

    def fused(self, x):
        first, _, second = self._modules.values()
        p, q = first.at(x), second.at(x)
        return mlp.svdquant_mlp(x, operands(p, p["bias"], first.spec.unsigned_from, 4, gelu_from=0),
                                operands(q, q["bias"], second.spec.unsigned_from, 4))
