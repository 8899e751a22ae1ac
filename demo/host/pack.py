"""The import of this repository as a package, as ComfyUI does it."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_pack() -> None:
    """Import the repository under the name `comfyui_svdquant`."""
    # If the repository is on the path, its cuda/ hides the `cuda` package that CuPy imports.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    spec = importlib.util.spec_from_file_location("comfyui_svdquant", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
