"""What a quantized model runs: the layout of a packed layer, the packed modules, the LoRA branch."""
