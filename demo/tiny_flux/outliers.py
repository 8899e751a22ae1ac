"""Channel rescaling that leaves FLUX's function alone and gives its activations outliers like those of the real model.

A few channels of the 12 B FLUX are many times larger than the rest after adaLN, which is what smoothing and the low-rank branch
are for. A network this small, trained for minutes, has hardly any; here a channel's activations are multiplied by a power of two and
the columns of the weights that read it divided by the same, so every product, and with it the picture, stays what it was.
"""

import torch

# Three channels of 256 get 8 times as large, which makes them 7 to 19 times the median channel; the layer benchmark gives the
# inputs after adaLN a few of 6 to 25 times. With ten of 8 or 16 times, plain rounding leaves no picture at all.
SHARE = 0.01
STRENGTHS = (8.0,)


def _factors(channels, generator, share, strengths):
    """(channels,) powers of two: strengths on a share of the channels, 1 elsewhere."""
    factors = torch.ones(channels)
    picked = torch.randperm(channels, generator=generator)[:round(channels * share)]
    factors[picked] = torch.tensor(strengths)[torch.randint(len(strengths), picked.shape, generator=generator)]
    return factors


def _rows(tensor, factors):
    return tensor * (factors[:, None] if tensor.ndim == 2 else factors)


def _scale_modulated(sd, mod, index, consumer, factors):
    """x (1 + scale) + shift becomes c times that: shift c, 1 + scale c; the consumer's columns are divided by c.

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
    """Attention mixes tokens, not channels: v times c, and the columns that read attention's output divided by c."""
    h = len(factors)
    for name in (f"{producer}.weight", f"{producer}.bias"):
        sd[name][2 * h:3 * h] = _rows(sd[name][2 * h:3 * h], factors)
    sd[f"{consumer}.weight"][:, :h] /= factors


def add_outliers(state, seed=0, share=SHARE, strengths=STRENGTHS):
    """A float32 copy of FLUX's state dict that computes the same with outlier channels before each block's linears."""
    sd = {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(seed)
    hidden = sd["img_in.weight"].shape[0]

    def factors():
        return _factors(hidden, generator, share, strengths)

    blocks = sorted({tuple(name.split(".")[:2]) for name in sd if name.split(".")[0] in ("double_blocks", "single_blocks")})
    for block in map(".".join, blocks):
        if block.startswith("double"):
            for stream in ("img", "txt"):
                mod, attn, mlp = (f"{block}.{stream}_{part}" for part in ("mod.lin", "attn", "mlp"))
                _scale_modulated(sd, mod, 0, f"{attn}.qkv", factors())
                _scale_modulated(sd, mod, 3, f"{mlp}.0", factors())
            shared = factors()
            for stream in ("img", "txt"):
                attn = f"{block}.{stream}_attn"
                _scale_values(sd, f"{attn}.qkv", f"{attn}.proj", shared)
        else:
            _scale_modulated(sd, f"{block}.modulation.lin", 0, f"{block}.linear1", factors())
            _scale_values(sd, f"{block}.linear1", f"{block}.linear2", factors())
    return sd
