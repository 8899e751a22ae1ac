"""SVDQuant itself: model families, layers, quantizer, checkpoints, downloads, and the adapter to ComfyUI (host)."""
