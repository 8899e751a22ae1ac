"""The packed layers of a model in the host, and its tensors without patches."""

from ..layers.linear import PackedLinear

PREFIX = "diffusion_model."  # what the names of a BaseModel's parameters begin with
COMPILED = "_orig_mod."  # in the names of parameters of a module that torch.compile has replaced


def packed_layers(module):
    """{name: packed layer}, names relative to `module`."""
    return {name.replace(COMPILED, ""): layer for name, layer in module.named_modules() if isinstance(layer, PackedLinear)}


def branch_bytes(layers):
    """Bytes of the LoRA branches of packed layers."""
    return sum(layer.lora_branch.nbytes() for layer in layers if layer.lora_branch)


def unpatched(module, backup, prefix=PREFIX):
    """{name: tensor} of a module as it is without patches. backup: a patcher's, whose keys begin with `prefix`, and which its clones share.
    While one of them is loaded with LoRAs, the backup holds the module's own tensors."""
    tensors = {name.replace(COMPILED, ""): tensor for name, tensor in module.state_dict().items()}
    for key, original in backup.items():
        tensors[key.removeprefix(prefix).replace(COMPILED, "")] = original.weight
    return tensors
