"""The adapter to ComfyUI, and the only room of quant/ that imports it."""
