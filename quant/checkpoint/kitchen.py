"""Quantized FLUX.1 files that others made under comfy-kitchen's names: `X.weight`, `X.weight_scale`, ..., `X.comfy_quant`.

They are read as our own files are, less our metadata: what those say, the tensors' shapes have to tell. Not every
layer need be packed, and linear2 may be one plain signed layer. comfy-kitchen has no layer in which the code of the
input changes on the way, so none of theirs means something else here.
"""

from .. import layout
from . import native

PREFIXES = ("", "model.diffusion_model.")


def _prefix(header):
    """Where the packed layers are; None where there is none that we run."""
    suffix = f".{layout.QUANT_KEY}"
    for key in header.tensors:
        if key.endswith(suffix):
            try:
                known = layout.decode_conf(header.read_bytes(key)).get("format") in native.MODULE_FORMATS
            except ValueError:
                continue
            if known:
                return max((prefix for prefix in PREFIXES if key.startswith(prefix)), key=len)
    return None


def matches(header):
    """Whether the file has a layer in one of our formats."""
    return _prefix(header) is not None


def open_file(header):
    """PackedFile; raises CheckpointError as native.open_file does."""
    return native.packed_file(header, _prefix(header), {}, {"preset": "comfy-kitchen file"}, header.file)
