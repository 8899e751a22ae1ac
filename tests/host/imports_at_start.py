"""Print each import at the start of a ComfyUI's modules that fails here, one a line:  python imports_at_start.py FOLDER

FOLDER: of ComfyUI's main.py. Imports that depend on a condition, that the module itself catches, or that a function makes are left out.
"""

import ast
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_AT_START = ("tests", "tests-unit", "script_examples", "custom_nodes", "input", "output", "temp", "user", "models", ".ci")


def wanted(tree: Path) -> dict[tuple[str, str | None], str]:
    """{(module, name in it or None): a file that imports it}, for other packages only."""
    own = {path.stem for folder in (tree, tree / "comfy") for path in folder.iterdir()}  # ComfyUI's nodes.py puts both on the path
    found = {}
    for path in sorted(tree.rglob("*.py")):
        place = path.relative_to(tree)
        if place.parts[0] in NOT_AT_START:
            continue
        pairs = []
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import):
                pairs += [(alias.name, None) for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
                pairs += [(statement.module, alias.name) for alias in statement.names]
        found.update({pair: str(place) for pair in pairs if pair[0].partition(".")[0] not in own})
    return found


def failure(module: str, name: str | None) -> str | None:
    """Why `import module` or `from module import name` fails; None if it doesn't."""
    try:
        found = importlib.import_module(module)
        if name not in (None, "*") and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
    except Exception as error:  # any exception in an import keeps ComfyUI from starting
        return f"{type(error).__name__}: {error}"


def main() -> None:
    sys.path.insert(0, str(ROOT / "demo"))
    from host import launch

    launch.define_torchvision_ops()
    launch.define_torchaudio()
    for (module, name), path in sorted(wanted(Path(sys.argv[1])).items(), key=str):
        if reason := failure(module, name):
            print(f"{path}: {module if name is None else f'{module}.{name}'}: {reason}")


if __name__ == "__main__":
    main()
