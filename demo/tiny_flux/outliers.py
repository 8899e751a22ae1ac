"""Channel rescaling that keeps FLUX's function and gives its activations outliers like those of the real model.

A few channels of the 12 B FLUX are many times larger than the rest after adaLN; smoothing and the low-rank branch exist for them. A
network this small, trained for minutes, has hardly any. This module multiplies a channel's activations by a power of two and divides the
weight columns that read the channel by the same number, so that every product, and therefore the picture, stays the same.
"""

import torch

# Three channels of 256 become 8 times as large, which is 7 to 19 times the median channel. The layer benchmark's inputs after adaLN have
# a few channels of 6 to 25 times. With ten channels of 8 or 16 times, naive rounding leaves no picture at all.
SHARE = 0.01
STRENGTHS = (8.0,)


def factors(channels, generator, share, strengths):
    """(channels,) powers of two: `strengths` on a fraction of the channels, 1 elsewhere."""
    made = torch.ones(channels)
    picked = torch.randperm(channels, generator=generator)[:round(channels * share)]
    made[picked] = torch.tensor(strengths)[torch.randint(len(strengths), picked.shape, generator=generator)]
    return made


def _rows(tensor, factors):
    return tensor * (factors[:, None] if tensor.ndim == 2 else factors)


def _scale_modulated(sd, mod, index, consumer, factors):
    """Multiply x (1 + scale) + shift by c, through shift and scale, and divide the consumer's columns by c.

    mod holds chunks of h rows (shift, scale, gate, ...); index is the shift's chunk.
    """
    h = len(factors)
    shift, scale = slice(index * h, (index + 1) * h), slice((index + 1) * h, (index + 2) * h)
    for name in (f"{mod}.weight", f"{mod}.bias"):
        sd[name][shift] = _rows(sd[name][shift], factors)
        sd[name][scale] = _rows(sd[name][scale], factors)
    sd[f"{mod}.bias"][scale] += factors - 1
    sd[f"{consumer}.weight"] /= factors


def _scale_values(sd, producer, consumer, factors):
    """Multiply v by c, and divide the columns that read the attention's output by c: attention mixes tokens, not channels."""
    h = len(factors)
    for name in (f"{producer}.weight", f"{producer}.bias"):
        sd[name][2 * h:3 * h] = _rows(sd[name][2 * h:3 * h], factors)
    sd[f"{consumer}.weight"][:, :h] /= factors


def add_outliers(state, seed=0, share=SHARE, strengths=STRENGTHS):
    """A float32 copy of FLUX's state dict with the same function, and with outlier channels before each block's linears."""
    sd = {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(seed)
    hidden = sd["img_in.weight"].shape[0]

    def drawn():
        return factors(hidden, generator, share, strengths)

    blocks = sorted({tuple(name.split(".")[:2]) for name in sd if name.split(".")[0] in ("double_blocks", "single_blocks")})
    for block in map(".".join, blocks):
        if block.startswith("double"):
            for stream in ("img", "txt"):
                mod, attn, mlp = (f"{block}.{stream}_{part}" for part in ("mod.lin", "attn", "mlp"))
                _scale_modulated(sd, mod, 0, f"{attn}.qkv", drawn())
                _scale_modulated(sd, mod, 3, f"{mlp}.0", drawn())
            shared = drawn()
            for stream in ("img", "txt"):
                attn = f"{block}.{stream}_attn"
                _scale_values(sd, f"{attn}.qkv", f"{attn}.proj", shared)
        else:
            _scale_modulated(sd, f"{block}.modulation.lin", 0, f"{block}.linear1", drawn())
            _scale_values(sd, f"{block}.linear1", f"{block}.linear2", drawn())
    return sd
