"""The models that the pack knows: one file a model family, each one a frozen declaration (family.py)."""
