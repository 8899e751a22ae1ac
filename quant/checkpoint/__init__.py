"""Checkpoint files: one module a format, all of them read through the checked header."""
