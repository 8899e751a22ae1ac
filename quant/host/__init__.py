"""The adapter to ComfyUI: the only folder of quant/ that imports it."""
