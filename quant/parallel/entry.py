"""Entering ComfyUI from a program that is not ComfyUI's main.py. Standard library only: it runs before torch is imported."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ROOT.parents[1]  # ComfyUI's folder, if this pack is in its custom_nodes


def enter_comfyui(program, folder, options):
    """Make `import comfy` and `import folder_paths` work, with ComfyUI's own options. Ends the program if there is no ComfyUI.

    program: its name, for the message; folder: ComfyUI's, or None for COMFYUI_PATH or the one that this pack is in.
    """
    found = next(path for path in (folder, os.environ.get("COMFYUI_PATH"), BESIDE) if path)
    if not (Path(found) / "comfy" / "sd.py").is_file():
        sys.exit(f"{program}: {found} is not ComfyUI's folder, which has a comfy/sd.py; name it with --comfyui, or in COMFYUI_PATH.")
    # This pack's folders nodes and cuda would hide ComfyUI's module and CuPy's package.
    sys.path[:] = [str(found), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    import comfy.options

    if not hasattr(comfy.options, "enable_args_parsing"):
        sys.exit(f"{program}: the ComfyUI in {found} no longer has comfy.options.enable_args_parsing, which {program} needs; update "
                 "ComfyUI-SVDQuant, or go back to the previous version of ComfyUI.")
    comfy.options.enable_args_parsing()
    arguments, sys.argv = sys.argv, ["main.py", *options]
    try:
        import comfy.cli_args  # reads sys.argv, once
    finally:
        sys.argv = arguments
