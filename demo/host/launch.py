"""Run ComfyUI's unchanged main.py as a child process of the demo or the tests:  python launch.py FOLDER ARGS...

`enter` makes ComfyUI's modules importable in the calling process; `enter_as_main` also sets up the GPU's memory as main.py does. All
first make torchvision and torchaudio importable if their native libraries do not fit the installed torch. The process of main.py ends
whenever its parent process ends.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import threading
import types
from pathlib import Path


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build; read without importing torch, which main.py must import itself."""
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
    define_torchvision_ops.kept = operators  # the operators disappear when the Library is collected


class Absent(type):
    """A stand-in for the object `full_name` of a package that is not installed. Importing it, reading its attributes and deriving classes
    from it work, as ComfyUI's modules do at start; calling it or such a class raises ImportError."""

    def __getattr__(cls, name: str) -> "Absent":
        return absent(f"{cls.full_name}.{name}")

    def __call__(cls, *_, **__):
        package = cls.full_name.partition(".")[0]
        raise ImportError(f"{cls.full_name} can't be called: {package} is not installed here, and models that need it don't run.")


def absent(full_name: str) -> Absent:
    name = full_name.rpartition(".")[2]
    if name.startswith("__"):  # Python and libraries use these names to test an object's abilities
        raise AttributeError(full_name)
    return Absent(name, (), {"full_name": full_name})


class AbsentPackage(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `package` and all its submodules; each is a module of Absent objects."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        ours = name.partition(".")[0] == self.package
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__getattr__ = lambda name: absent(f"{module.__name__}.{name}")


def define_torchaudio() -> None:
    """Make torchaudio importable if it is not installed: ComfyUI imports it at start and uses it only in audio models."""
    if importlib.util.find_spec("torchaudio") is None:
        sys.meta_path.append(AbsentPackage("torchaudio"))


def enter(folder: Path, *options: str) -> None:
    """Make `import comfy...` and `import folder_paths` work in this process, as main.py with these options would run them."""
    define_torchvision_ops()
    define_torchaudio()
    sys.path.insert(0, str(folder))
    import comfy.options
    import utils  # noqa: F401  now, as main.py does: ComfyUI's nodes.py will put a folder with another utils in front

    comfy.options.enable_args_parsing()
    arguments = sys.argv
    sys.argv = ["main.py", *options]
    try:
        import comfy.cli_args  # reads sys.argv, once
    finally:
        sys.argv = arguments


def enter_as_main(folder: Path, *options: str) -> bool:
    """`enter`, and what main.py does for a GPU: choose PyTorch's allocator, and stream weights by Dynamic VRAM where this ComfyUI has it.
    Call it before anything imports torch. Returns whether Dynamic VRAM is on."""
    enter(folder, *options)
    import comfy.cli_args
    import cuda_malloc  # noqa: F401  it sets the allocator in the environment, where PyTorch reads it once

    if not getattr(comfy.cli_args, "enables_dynamic_vram", bool)() or importlib.util.find_spec("comfy_aimdo") is None:
        return False
    from comfy_aimdo import control

    args = comfy.cli_args.args
    control.init(**({"nvml_pressure": not args.disable_nvml_pressure} if hasattr(args, "disable_nvml_pressure") else {}))
    control.set_log_info()  # until then it logs every allocation, by a Python function that it calls while PyTorch's allocator is locked
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    device = comfy.model_management.get_torch_device()
    comfy.memory_management.aimdo_enabled = device.type == "cuda" and control.init_device(device.index)
    if comfy.memory_management.aimdo_enabled:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    return comfy.memory_management.aimdo_enabled


def end_with_parent() -> None:
    """End this process once its standard input, a pipe from the parent, is closed."""

    def wait_for_end():
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


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
