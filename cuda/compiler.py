"""CUDA source to machine code: NVRTC -> cubin -> disk cache. kernel_loader.py loads it, runtime.py launches it.

NVRTC is called through ctypes rather than by CuPy's RawModule: CuPy can't name sm_90a (wgmma) before CUDA 12.9, and compiling
without CuPy lets the tests look at the machine code where there is no GPU. The library is loaded with the first kernel.
The sources include no CUDA headers, only kernels/*.cuh.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from . import targets
from .errors import KernelsUnavailable

SOURCES = Path(__file__).with_name("kernels")
CACHE_VARIABLE = "SVDQUANT_CACHE_DIR"  # environment variable that replaces the user's cache folder
OUT_OF_MEMORY = 1  # NVRTC_ERROR_OUT_OF_MEMORY
OPTIONS = ("-std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v")

log = logging.getLogger(__name__)


# --- NVRTC -----------------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    cubin: bytes
    log: str  # NVRTC's and ptxas's messages: registers, shared memory, spills, warnings


class Nvrtc:
    """The functions of one NVRTC library that this module uses."""

    def __init__(self, path):
        path = str(path)
        if os.path.dirname(path):  # NVRTC finds its builtins library by name, but only if it is already loaded
            for builtins in Path(path).parent.glob("nvrtc-builtins64_*.dll"):
                ctypes.CDLL(str(builtins))
        self.library = ctypes.CDLL(path)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def _call(self, name, *args):
        status = getattr(self.library, name)(*args)
        if status == OUT_OF_MEMORY:
            raise MemoryError(f"{name} failed: NVRTC is out of memory")
        if status != 0:
            raise KernelsUnavailable(f"{name} failed: {self.library.nvrtcGetErrorString(status).decode()}")

    @functools.cached_property
    def architectures(self):
        """Compute capabilities that this NVRTC compiles for, as integers such as 89."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return tuple(numbers)

    def compile(self, name, source, headers, options):
        """Compile `source` (str) with `headers` {include name: text} to a Compiled.

        Raises KernelsUnavailable with the compiler's log, or MemoryError."""
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names)
        try:
            status = self.library.nvrtcCompileProgram(program, len(options), flags)
            messages = self._text(program, "nvrtcGetProgramLog").rstrip(b"\0\n").decode(errors="replace")
            if status == OUT_OF_MEMORY:
                raise MemoryError(f"NVRTC is out of memory: it could not compile {name}")
            if status != 0:
                raise KernelsUnavailable(f"NVRTC {version_text(self.version)} could not compile {name} with "
                                         f"{' '.join(options)}:\n{messages}")
            return Compiled(self._text(program, "nvrtcGetCUBIN"), messages)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program, getter):
        size = ctypes.c_size_t()
        self._call(f"{getter}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(getter, program, buffer)
        return buffer.raw


def version_text(version):
    return ".".join(map(str, version))


def cuda_major():
    """The CUDA generation of this PyTorch (12, 13), or 13 where PyTorch has none."""
    return int((torch.version.cuda or "13").split(".")[0])


def nvrtc_package():
    return "nvidia-cuda-nvrtc" if cuda_major() >= 13 else "nvidia-cuda-nvrtc-cu12"  # PyTorch for CUDA 11 uses this one too


def nvrtc_candidates():
    """Paths where NVRTC may be, best first: in PyTorch or NVIDIA's packages, in a CUDA toolkit, in the system."""
    folders = [Path(torch.__file__).parent / "lib"]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec else None) or ():
        folders += sorted(Path(root).glob("*/lib")) + sorted(Path(root).glob("*/bin")) + sorted(Path(root).glob("*/bin/*"))
    for toolkit in filter(None, map(os.environ.get, ("CUDA_PATH", "CUDA_HOME"))):
        folders += [Path(toolkit, "lib64"), Path(toolkit, "bin"), Path(toolkit, "bin", "x64")]
    found = []
    for folder in folders:
        found += sorted(folder.glob("libnvrtc*.so.*")) + sorted(folder.glob("nvrtc64_*.dll"))
    found = [path for path in found if "builtins" not in path.name and ".alt." not in path.name]
    majors = sorted((12, 13), key=lambda major: major != cuda_major())
    system = [f"nvrtc64_{major}0_0.dll" if os.name == "nt" else f"libnvrtc.so.{major}" for major in majors]
    # PyTorch's CUDA generation comes first: a driver may not load machine code of a newer CUDA generation than its own.
    return [path for major in majors for path in found if _major(path.name) == major] + system


def _major(name):
    """libnvrtc.so.13, libnvrtc-1a2b3c4d.so.12, nvrtc64_120_0.dll -> 13, 12, 12."""
    match = re.search(r"\.so\.(\d+)|nvrtc64_(\d\d)", name)
    return int(match[1] or match[2]) if match else None


@functools.cache
def nvrtc():
    """This machine's NVRTC. Raises KernelsUnavailable if there is none."""
    for path in nvrtc_candidates():
        try:
            library = Nvrtc(path)
        except (OSError, AttributeError) as error:
            log.debug("NVRTC: %s: %s", path, error)
            continue
        if library.version >= (12, 0):
            return library
    raise KernelsUnavailable("The CUDA kernels need NVRTC 12 or newer, and none was found. "
                             f"Install it into ComfyUI's Python: pip install {nvrtc_package()}")


# --- Source to cubin -------------------------------------------------------------------------------------------------


def _compilable(arch):
    """`arch`, or the nearest older architecture of its family if this NVRTC doesn't know it."""
    found = targets.compiled_arch(arch, nvrtc().architectures)
    if found is None:
        raise KernelsUnavailable(f"NVRTC {version_text(nvrtc().version)} can't compile for this GPU ({arch}). A newer one is "
                                 "needed: update PyTorch to a build for a newer CUDA.")
    return found


@functools.cache
def _source_text(name):
    return (SOURCES / name).read_text(encoding="utf-8")


@functools.cache
def _headers():
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cuh"))}


def compile_source(source, defines, arch):
    """Compile kernels/`source` with -D `defines` ((name, value), ...) for `arch` to a Compiled. This needs no GPU."""
    return nvrtc().compile(source, _source_text(source), _headers(), _options(defines, arch))


def compile_cubin(source, defines, arch):
    """The machine code of kernels/`source`, from the disk cache if it has it."""
    path = cache_folder() / f"{Path(source).stem}-{arch}-{digest(source, defines, arch)[:32]}.cubin"
    cubin = read_entry(path)
    if cubin is None:
        compiled = compile_source(source, defines, arch)
        for line in complaints(compiled.log):
            log.warning("%s for %s: %s", source, arch, line)
        cubin = compiled.cubin
        write_entry(path, cubin)
    return cubin


def complaints(messages):
    """The lines of a compiler's log that report a kernel slower than its source intends: spills and serialized wgmma. C7519 is left out:
    it only reports that the compiler added a fence where one is needed."""
    return [line.strip() for line in messages.splitlines()
            if re.search(r"[1-9]\d* bytes (stack frame|spill)|\bC75(?!19)\d\d\b|serialized", line)]


def _options(defines, arch):
    return (f"-arch={_compilable(arch)}", *OPTIONS, *(f"-D{name}={value}" for name, value in defines))


def digest(source, defines, arch):
    """A digest of everything that determines the machine code, as a hexadecimal number."""
    everything = (source, _source_text(source), tuple(_headers().items()), _options(defines, arch), nvrtc().version)
    return hashlib.sha256(repr(everything).encode()).hexdigest()


@functools.cache
def all_sources_digest():
    """A digest of all kernels' sources and of the compiler, as a hexadecimal number."""
    sources = [(path.name, path.read_text(encoding="utf-8")) for path in sorted(SOURCES.glob("*.cu*"))]
    return hashlib.sha256(repr((sources, OPTIONS, nvrtc().version)).encode()).hexdigest()


# --- Disk cache ------------------------------------------------------------------------------------------------------


def cache_folder():
    """The folder of compiled kernels: SVDQUANT_CACHE_DIR, or comfyui-svdquant/kernels in the platform's cache folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    if os.name == "nt":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "comfyui-svdquant" / "kernels"


def read_entry(path):
    """The data of a cache entry, which is the data's SHA-256 and the data. None if the entry is missing or damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    checksum, data = entry[:32], entry[32:]
    return data if data and hashlib.sha256(data).digest() == checksum else None


def write_entry(path, data):
    """Write a cache entry atomically: other processes see no entry or a whole one. A cache that can't be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _write_beside(path, hashlib.sha256(data).digest() + data)
    except OSError as error:
        _warn(unwritable(path.parent, error.strerror or str(error)))
        return
    try:
        os.replace(temporary, path)
    except OSError as error:  # Windows refuses while another process reads the entry, which is as good
        os.unlink(temporary)
        log.debug("%s was not cached: %s", path, error)


def _write_beside(path, data):
    """Write a new file in the folder of `path`; return its name."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError:
        os.unlink(temporary)
        raise
    return temporary


def unwritable(folder, reason):
    """The message for a cache folder in which no file can be written."""
    return (f"The folder of compiled kernels, {folder}, can't be written ({reason}), so that each start of ComfyUI compiles them again; "
            f"make it writable, or set {CACHE_VARIABLE} to another folder.")


@functools.cache
def _warn(message):
    """Log a warning, once."""
    log.warning(message)
