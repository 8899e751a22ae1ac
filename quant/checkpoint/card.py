"""The model card in a file's metadata: modelspec.*, the ModelSpec standard that model lists read.

Fields that hold for the quantized model as for its source (author, licence, ...) are copied. The source's hash goes into
svdquant.source_hash_sha256: under its own name, model lists would take it for the hash of the quantized file's tensors.
"""

import os
from datetime import datetime, timezone

PREFIX = "modelspec."
SUFFIX = " (SVDQuant)"
COPIED = ("architecture", "author", "license", "description", "usage_hint", "tags", "merged_from", "resolution",
          "trigger_phrase", "prediction_type", "thumbnail")
SOURCE_TITLE, SOURCE_HASH = "svdquant.source_title", "svdquant.source_hash_sha256"
MAX_FIELD_BYTES = 1 << 20  # thumbnails, usually the largest fields, have about 100 kB


def of_source(metadata):
    """The fields of a file's metadata, {str: str}, that a quantized model inherits. A quantized file passes on those that it inherited."""
    found = {PREFIX + field: metadata[PREFIX + field] for field in COPIED if PREFIX + field in metadata}
    title = metadata.get(f"{PREFIX}title", "").removesuffix(SUFFIX)
    if "svdquant.version" in metadata or "svdquant.recipe" in metadata:
        title = metadata.get(SOURCE_TITLE, "")  # modelspec.title is the quantized file's
    found |= {SOURCE_TITLE: title, SOURCE_HASH: metadata.get(f"{PREFIX}hash_sha256") or metadata.get(SOURCE_HASH, "")}
    return {key: value for key, value in found.items() if value and len(value) <= MAX_FIELD_BYTES}


def modelspec(path, architecture, source=None):
    """The card's metadata for a file to be written to `path`. architecture: a Family's; source: of_source of the quantized model's file."""
    source = source or {}
    title = source.get(SOURCE_TITLE) or os.path.splitext(os.path.basename(path))[0]
    return {f"{PREFIX}architecture": architecture} | source | {
        f"{PREFIX}sai_model_spec": "1.0.0", f"{PREFIX}title": title + SUFFIX,
        f"{PREFIX}date": _date().strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _date():
    """The present, or the time in SOURCE_DATE_EPOCH: the convention by which equal inputs give files of equal bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), timezone.utc) if epoch.isdecimal() and len(epoch) < 12 else datetime.now(timezone.utc)
