"""Nunchaku's names of tensors, from a family's tables (families.family.Nunchaku).

Published FLUX.1 files have the names of the format's first version (v1), Qwen-Image's and Z-Image's those of the second (v2), as files of
FLUX.1 by newer tools have. The function `v1` converts names of the second version; where the first has no name for a module, it stays.
"""

from ... import families


def family_of(keys):
    """The Family of a Nunchaku model with these tensor names, in either version; None if no family with Nunchaku files has them."""
    known = (family for family in families.FAMILIES if family.nunchaku)
    return next((family for family in known if all(f"{name}.weight" in keys for name in family.nunchaku.inputs)), None)


def v1(tables, name):
    """The v1 name of a tensor. A v1 name is returned unchanged."""
    return _renamed(name, tables.modules_v2, tables.leaves_v2)


def v2(tables, name):
    """The v2 name of a tensor: the inverse of v1."""
    return _renamed(name, {kind: _inverse(modules) for kind, modules in tables.modules_v2.items()}, _inverse(tables.leaves_v2))


def _renamed(name, modules, leaves):
    """A tensor's name with its module and its leaf renamed. modules: {Nunchaku's list: {module within a block: its other name}}."""
    kind, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    if kind not in modules or not rest:
        return name
    module, _, leaf = rest.rpartition(".")
    return f"{kind}.{index}.{modules[kind].get(module, module)}.{leaves.get(leaf, leaf)}"


def _inverse(table):
    return {value: key for key, value in table.items()}


def depth(names, kind):
    """The number of blocks in Nunchaku's list `kind`, one more than the highest index in `names`."""
    indices = (name.split(".")[1] for name in names if name.startswith(f"{kind}."))
    return 1 + max((int(index) for index in indices if index.isdecimal() and len(index) < 5), default=-1)


def blocks(tables, depths):
    """Yield (our prefix, Nunchaku's prefix, Nunchaku's list) of every block. depths: {Nunchaku's list: number of blocks}."""
    for ours, kind in tables.blocks.items():
        for i in range(depths[kind]):
            yield f"{ours}.{i}", f"{kind}.{i}", kind


def depth_keys(family):
    """{Nunchaku's list of blocks: the configuration key of its length}."""
    return {blocks: key for key, blocks in family.diffusers.blocks.items()}
