"""The prompts of a calibration without a graph: encoded by ComfyUI's text encoders, or prepared in a safetensors file.

Such a file has the tensors `0.cond` (1, T, W), `1.cond`, ..., one for each prompt, and beside each of them what else the prompt's
conditioning has as tensors: `0.pooled_output`, `0.attention_mask`. A number, such as `0.guidance`, is a tensor of no dimensions.
"""

import comfy.model_management
import comfy.sd
import torch
from safetensors.torch import save_file

from ..checkpoint.header import CheckpointError, read_header

COND = "cond"


def prompts_of(text):
    """The prompts of a text file: one a line. Empty lines and those that begin with # are left out."""
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def encode(family, paths, prompts):
    """The conditioning of prompts, as a text encode node gives it. paths: the files of the family's text encoders."""
    # As CLIPLoader does: some versions find out by the file which encoder it is, and have no name for it.
    kind = getattr(comfy.sd.CLIPType, family.clip_type, comfy.sd.CLIPType.STABLE_DIFFUSION)
    encoder = comfy.sd.load_clip(ckpt_paths=list(paths), clip_type=kind)
    found = [entry for prompt in prompts for entry in encoder.encode_from_tokens_scheduled(encoder.tokenize(prompt))]
    del encoder
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return found


def with_guidance(conditioning, guidance):
    """The conditioning with a value of guidance, as FluxGuidance sets it; unchanged if that is None."""
    return conditioning if guidance is None else [[cond, extras | {"guidance": guidance}] for cond, extras in conditioning]


def write(path, conditioning):
    """Write a conditioning to a file. What is neither a tensor nor a number is left out."""
    tensors = {}
    for i, (cond, extras) in enumerate(conditioning):
        for key, value in ({COND: cond} | extras).items():
            if isinstance(value, (torch.Tensor, int, float)):
                tensors[f"{i}.{key}"] = torch.as_tensor(value).cpu().contiguous().clone()
    save_file(tensors, path)


def read(path):
    """The conditioning of a file. Raises CheckpointError if the file holds none."""
    header, found = read_header(path), {}
    for name in header.tensors:
        number, _, key = name.partition(".")
        if not number.isdecimal() or not key:
            raise CheckpointError(f"{header.file} has the tensor {name} and is no conditioning; write one with --write-conditioning.")
        tensor = header.read_tensor(name)
        found.setdefault(int(number), {})[key] = tensor if tensor.ndim else tensor.item()
    lacking = next((number for number, entry in found.items() if COND not in entry), None)
    if not found or lacking is not None:
        raise CheckpointError(f"{header.file} lacks {lacking or 0}.{COND} and is no conditioning; write one with --write-conditioning.")
    return [[found[number].pop(COND), found[number]] for number in sorted(found)]
