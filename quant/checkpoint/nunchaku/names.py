"""Nunchaku's names of tensors, by a family's tables (families.family.Nunchaku).

Published FLUX.1 files have the names of the format's first version (v1), which `v1` also makes of the second's (v2, as newer tools write
them).
"""

from ... import families


def family_of(keys):
    """The Family of a Nunchaku model with these tensor names, in either version; None where no family with Nunchaku's files has them."""
    known = (family for family in families.FAMILIES if family.nunchaku)
    return next((family for family in known if all(f"{name}.weight" in keys for name in family.nunchaku.inputs)), None)


def v1(tables, name):
    """The v1 name of a tensor; a v1 name stays."""
    kind, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    if kind not in tables.modules_v2 or not rest:
        return name
    module, _, leaf = rest.rpartition(".")
    return f"{kind}.{index}.{tables.modules_v2[kind].get(module, module)}.{tables.leaves_v2.get(leaf, leaf)}"


def depth(names, kind):
    """How many blocks of the list `kind` of theirs the names show: one more than the highest index."""
    indices = (name.split(".")[1] for name in names if name.startswith(f"{kind}."))
    return 1 + max((int(index) for index in indices if index.isdecimal() and len(index) < 5), default=-1)


def blocks(tables, depths):
    """Yield (our prefix, their prefix, their list) of every block. depths: {their list: count}."""
    for ours, kind in tables.blocks.items():
        for i in range(depths[kind]):
            yield f"{ours}.{i}", f"{kind}.{i}", kind


def depth_keys(family):
    """{their list of blocks: the configuration key of its length}."""
    return {blocks: key for key, blocks in family.diffusers.blocks.items()}
