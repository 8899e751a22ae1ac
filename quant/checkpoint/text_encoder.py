"""Our file of a text encoder: its weights in 4 bits under the names that ComfyUI gives to a 16-bit file of the same encoder.

A packed linear X has the tensors of an awq_w4a16 layer (layers/layout.py), a packed embedding those of ComfyUI's int8_tensorwise
(layers/packed_embedding.py); `X.comfy_quant` describes each. All other tensors are as in a 16-bit file, among them those of a tokenizer
that ComfyUI reads from the encoder's file (TOKENIZERS). The file's metadata:

    svdquant.text_encoder  "1": the version of this format; a reader refuses a higher number
    svdquant.config        JSON: {"transformer": the class that ComfyUI loads the file into, "multimodal": whether names are as MULTIMODAL}
    svdquant.recipe        JSON: how it was quantized: preset, layers with their errors, layers that were kept in 16 bits
    svdquant.source        what was quantized
    svdquant.checksums     checksums.py
    modelspec.*            card.py

Such a file is no diffusion model, and has no svdquant.version, by which native.py recognizes its files.
"""

import json
from dataclasses import dataclass
from itertools import chain

import torch

from ..layers import layout
from ..layers.packed_embedding import INT8, EmbeddingSpec
from . import checksums
from .card import modelspec
from .header import WEIGHT_DTYPES, CheckpointError, Header
from .native import SCALE_TYPES, check_tensor, info_of, json_metadata, version_of
from .write import write

KEY, VERSION = "svdquant.text_encoder", 1
TOKENIZERS = ("spiece_model", "tekken_model", "tokenizer_json")  # ComfyUI's names for a tokenizer's bytes
# {beginning of a name in the transformer: in the file}, of encoders that also see images, as ComfyUI renames them when it loads a file.
MULTIMODAL = {"model.lm_head.": "lm_head.", "model.": "model.language_model.", "visual.": "model.visual."}


@dataclass(frozen=True)
class EncoderFile:
    """An opened file, checked. specs: {layer's name in the file: LayerSpec or EmbeddingSpec}; transformer: the class that it is for;
    multimodal: whether its names are renamed (MULTIMODAL); recipe, source: as stored."""

    header: Header
    specs: dict
    transformer: str
    multimodal: bool
    recipe: dict
    source: str

    def shape(self, name):
        """The shape of a tensor as in a 16-bit file; None for those that a 16-bit file doesn't have."""
        layer, _, part = name.rpartition(".")
        if layer not in self.specs or part == "bias":
            return None if part == layout.QUANT_KEY else self.header.tensors[name].shape
        return (self.specs[layer].out_features, self.specs[layer].in_features) if part == "weight" else None

    def own_name(self, name):
        """The transformer's name of a tensor, or of a layer."""
        return renamed(name, {there: here for here, there in MULTIMODAL.items()}) if self.multimodal else name

    def tensors(self):
        """{the transformer's name: tensor} of all but tokenizers, read into memory of their own."""
        return {self.own_name(name): self.header.read_tensor(name) for name in self.header.tensors
                if name not in TOKENIZERS and not name.endswith(f".{layout.QUANT_KEY}")}

    def check(self):
        """Raise CheckpointError if a tensor is not as it was saved, as far as a load checks it (checksums.check)."""
        kinds = {name: checksums.kind(name, info.dtype) for name, info in self.header.tensors.items()}
        checksums.check(self.header, kinds, whole=False)


def renamed(name, table):
    """A name with its beginning replaced: the longest that fits of `table`, {beginning: replacement}."""
    found = max((beginning for beginning in table if name.startswith(beginning)), key=len, default=None)
    return name if found is None else table[found] + name.removeprefix(found)


def matches(header):
    """Whether the file has this format."""
    return KEY in header.metadata


def open_file(header):
    """The EncoderFile of a header. Raises CheckpointError, before any weight is read, unless all descriptions are valid and all packed
    layers whole. Whether the encoder is whole shows when ComfyUI's own class is built (host/clip_loader.py)."""
    header.check_extension()
    version_of(header, KEY, VERSION)
    config = json_metadata(header, "svdquant.config")
    transformer, multimodal = config.get("transformer"), config.get("multimodal")
    if not isinstance(transformer, str) or not isinstance(multimodal, bool):
        raise CheckpointError(f"{header.file} has no valid svdquant.config in its metadata; save or download it again.")
    suffix = f".{layout.QUANT_KEY}"
    layers = [name.removesuffix(suffix) for name in header.tensors if name.endswith(suffix)]
    specs = {layer: _spec(header, layer) for layer in layers}
    packed = {f"{layer}.{part}" for layer, spec in specs.items() for part in spec.tensors()}
    for name, info in header.tensors.items():
        plain = name not in packed and not name.endswith(suffix)
        if plain and info.dtype not in ((torch.uint8,) if name in TOKENIZERS else WEIGHT_DTYPES):
            raise CheckpointError(f"{header.file}: tensor {name} is {info.dtype} instead of a floating point type; the file is damaged, "
                                  "download or save it again.")
    return EncoderFile(header, specs, transformer, multimodal, json_metadata(header, "svdquant.recipe"),
                       header.metadata.get("svdquant.source", ""))


def _spec(header, layer):
    """The LayerSpec or EmbeddingSpec of a packed layer. Raises CheckpointError unless description and tensors agree."""
    conf = header.description(f"{layer}.{layout.QUANT_KEY}")
    kind, weight = conf.get("format"), info_of(header, f"{layer}.weight")
    if kind not in (layout.AWQ, INT8) or conf.get("group_size", layout.GROUP_SIZES[layout.AWQ]) != layout.GROUP_SIZES[layout.AWQ]:
        raise CheckpointError(f"{header.file}: layer {layer} has format {kind!r} with group size {conf.get('group_size')!r}, which this "
                              "version can't run; update ComfyUI-SVDQuant.")
    if len(weight.shape) != 2:
        raise CheckpointError(f"{header.file}: tensor {layer}.weight has shape {list(weight.shape)} instead of two dimensions; the file is "
                              "damaged, download or save it again.")
    try:
        if kind == INT8:
            spec = EmbeddingSpec(weight.shape[1], weight.shape[0])
        else:
            dtype = info_of(header, f"{layer}.weight_scale").dtype
            spec = layout.LayerSpec(layout.AWQ, 2 * weight.shape[1], weight.shape[0], bias=f"{layer}.bias" in header.tensors, dtype=dtype)
    except ValueError as error:
        raise CheckpointError(f"{header.file}: layer {layer} {error}; save or download the file again.") from None
    if spec.dtype not in SCALE_TYPES:
        raise CheckpointError(f"{header.file}: layer {layer} has scales of type {spec.dtype}; the file is damaged, download or save it "
                              "again.")
    for part, (shape, dtype) in spec.tensors().items():
        check_tensor(header, f"{layer}.{part}", shape, dtype)
    return spec


def save(path, tensors, specs, transformer, multimodal, recipe, source, tokenizer, overwrite=False):
    """Write a file as write.write does.

    tensors: {name in the transformer: tensor}; specs: {layer's name there: LayerSpec or EmbeddingSpec}; transformer: the transformer's
    class; multimodal: whether the file's names are MULTIMODAL's; recipe: JSON-able dict; source: str; tokenizer: {one of TOKENIZERS: uint8
    tensor}. Raises CheckpointError as write.write does.
    """
    def stored(name):
        return renamed(name, MULTIMODAL) if multimodal else name

    described = {f"{stored(layer)}.{layout.QUANT_KEY}": layout.encode_conf(spec.conf()) for layer, spec in specs.items()}
    infos = {stored(name): (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    infos |= {name: (tensor.shape, tensor.dtype) for name, tensor in (described | tokenizer).items()}
    config = {"transformer": transformer, "multimodal": multimodal}
    metadata = {KEY: str(VERSION), "svdquant.config": json.dumps(config), "svdquant.recipe": json.dumps(recipe), "svdquant.source": source,
                **modelspec(path, transformer.rpartition(".")[2])}
    named = ((stored(name), tensor) for name, tensor in tensors.items())
    write(path, infos, chain(named, described.items(), tokenizer.items()), metadata, overwrite)
