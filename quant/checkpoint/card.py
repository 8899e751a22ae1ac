"""The model card in a file's metadata: modelspec.*, the ModelSpec standard that model lists read.

What is true of the quantized model as of its source is copied (author, licence, ...). The source's hash is not, under that
name: it is the hash of other tensors, and model lists take it for the file's own. It goes into svdquant.source_hash_sha256.
"""

import os
from datetime import datetime, timezone

PREFIX = "modelspec."
SUFFIX = " (SVDQuant)"
COPIED = ("architecture", "author", "license", "description", "usage_hint", "tags", "merged_from", "resolution",
          "trigger_phrase", "prediction_type", "thumbnail")
SOURCE_TITLE, SOURCE_HASH = "svdquant.source_title", "svdquant.source_hash_sha256"
MAX_FIELD_BYTES = 1 << 20  # a thumbnail is the largest that is usual, at some 100 kB


def of_source(metadata):
    """What a model's file hands on to the quantized model, out of its metadata {str: str}. Of a quantized file, the same."""
    found = {PREFIX + field: metadata[PREFIX + field] for field in COPIED if PREFIX + field in metadata}
    title = metadata.get(f"{PREFIX}title", "").removesuffix(SUFFIX)
    if "svdquant.version" in metadata or "svdquant.recipe" in metadata:
        title = metadata.get(SOURCE_TITLE, "")  # the other one is the file's name
    found |= {SOURCE_TITLE: title, SOURCE_HASH: metadata.get(f"{PREFIX}hash_sha256") or metadata.get(SOURCE_HASH, "")}
    return {key: value for key, value in found.items() if value and len(value) <= MAX_FIELD_BYTES}


def modelspec(path, architecture, source=None):
    """The card's metadata of a file to be written to `path`; architecture: a Family's; source: of_source of what was quantized."""
    source = source or {}
    title = source.get(SOURCE_TITLE) or os.path.splitext(os.path.basename(path))[0]
    return {f"{PREFIX}architecture": architecture} | source | {
        f"{PREFIX}sai_model_spec": "1.0.0", f"{PREFIX}title": title + SUFFIX,
        f"{PREFIX}date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
