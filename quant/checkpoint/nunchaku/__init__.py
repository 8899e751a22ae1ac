"""Nunchaku's FLUX.1 checkpoints: read and written."""
