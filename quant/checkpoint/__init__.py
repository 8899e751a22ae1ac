"""Checkpoint files: one module per format. Every format is read through the checked header."""
