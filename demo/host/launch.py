"""Run ComfyUI's main.py, as it is, as a child of the demo or the tests:  python launch.py FOLDER ARGS...

Before that, torchvision and torchaudio are made importable where their native halves do not fit the installed torch, and the
server is made to end when the process that started it ends, however that happens.
"""

import importlib.machinery
import importlib.util
import os
import runpy
import sys
import threading
import types
from pathlib import Path


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build; read without importing torch, which main.py wants to do itself."""
    version = Path(importlib.util.find_spec("torch").origin).with_name("version.py")
    return runpy.run_path(str(version))["cuda"] is not None


def define_torchvision_ops() -> None:
    """Declare torchvision's two operators that its Python half needs at import, where its native half cannot be loaded.

    A torchvision built for CUDA does not load beside a CPU torch. ComfyUI uses neither operator.
    """
    if torch_has_cuda():
        return
    import torch

    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    for library in (path for path in folder.glob("_C*") if path.suffix in (".so", ".pyd", ".dylib")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    define_torchvision_ops.kept = operators  # a Library takes its operators with it when it is collected


def define_torchaudio() -> None:
    """Put an empty torchaudio where there is none: ComfyUI imports it at start and uses it in audio models only."""
    if importlib.util.find_spec("torchaudio") is None:
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", loader=None)
        sys.modules["torchaudio"] = module


def end_with_parent() -> None:
    """End this process once its standard input, a pipe from the parent, is closed."""

    def watch():
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    comfy = Path(sys.argv[1])
    sys.argv = [str(comfy / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(comfy)
    end_with_parent()
    define_torchvision_ops()
    define_torchaudio()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
