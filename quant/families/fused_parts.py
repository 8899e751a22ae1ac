"""What the fused forwards of several families' blocks share: the end of an attention or of an MLP, and the check of modulations."""

from typing import NamedTuple

from torch import Tensor

from ...cuda import block_ops


class Modulation(NamedTuple):
    """The vectors of a norm and of the part of the block after it, each (B or 1, 1, K)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def output(module, x):
    """The module's output in x's dtype, the only one that the kernels read beside x. A hook or another pack's layer may change it."""
    return in_dtype_of(x, module(x))


def in_dtype_of(x, y):
    return y if y.dtype == x.dtype else y.to(x.dtype)


def added(module, x, residual, mod):
    """residual + gate * the module's output, in one op if the module has it."""
    z = module.add_gated(x, residual, mod.gate) if hasattr(module, "add_gated") else None
    return block_ops.gated_residual(residual, output(module, x), mod.gate) if z is None else z


def added_and_norm(module, x, residual, mod, norm_mod, eps):
    """(residual + gate * the module's output, its LayerNorm with the modulation norm_mod)"""
    z = module.add_gated(x, residual, mod.gate) if hasattr(module, "add_gated") else None
    if z is None:
        return block_ops.gated_residual_norm(residual, output(module, x), mod.gate, norm_mod.scale, norm_mod.shift, eps)
    return z, block_ops.norm_modulate(z, norm_mod.scale, norm_mod.shift, eps)


def one_vector(x, *mods):
    """Whether every modulation has one vector for all of x, or one an image, rather than one a token."""
    return all(part.ndim == 3 and part.shape[0] in (1, x.shape[0]) and part.shape[1] == 1 and part.shape[2] == x.shape[2]
               for mod in mods for part in (mod.shift, mod.scale, mod.gate))
