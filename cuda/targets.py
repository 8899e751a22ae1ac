"""The properties of each GPU generation, one row per compute capability. A new generation is one new row, and a kernel if it needs one.

Only this module compares compute capabilities. All other code asks a Target for the property that it needs.
"""

import functools
import re
from dataclasses import dataclass, replace

import torch

from .errors import KernelsUnavailable

MEASURED_BANDWIDTH = 3352.0  # GB/s of an H100's memory, where the cost models were measured


@dataclass(frozen=True)
class Target:
    """A GPU generation."""

    number: int             # compute capability: 89 for 8.9
    shared_per_sm: int      # bytes of shared memory per SM
    shared_per_cta: int     # bytes of shared memory that a CTA may use
    bf16: bool              # the kernels compute in bf16 too; otherwise only in fp16
    async_copies: bool      # cp.async; without it a GEMM prefetches through registers into two stages
    native_int4: bool       # 4-bit MMAs; without them ptxas emulates each MMA in 200 instructions
    wgmma: bool             # gemm_wgmma.cu runs, for int8 codes
    max_cluster: int        # CTAs of the largest cluster; 1: no clusters
    dependent_launch: bool  # programmatic dependent launch: a kernel may start while the previous one ends
    quantize_ranks: int     # the most ranks that quantize.cu computes; cuBLAS computes larger branches, or is faster for them
    register_tiles: int     # quantize_registers.cu: 16-token tiles per CTA that fit in registers; 0: no clusters, which it needs
    default_act_bits: int   # 4 if 4-bit MMAs are fast. On A100 and Orin the rescaling of each group takes longer than the MMAs
    fused_mlp: bool         # mlp.py is faster. With 4-bit codes in bytes it isn't: 1893 us against 1601 on an H100 (benchmarks/NOTES.md)
    generation: str         # its name, for users
    measured: bool = False  # the cost models of the kernels were measured on this generation; autotune.py measures on the others
    bandwidth: float = MEASURED_BANDWIDTH  # GB/s of device memory, which GPUs of one generation have more or less of (for_device)

    @property
    def arch(self):
        """The architecture to compile for, such as "sm_89". wgmma exists only in sm_90a, whose machine code no other GPU runs."""
        return f"sm_{self.number}{'a' if self.wgmma else ''}"

    @property
    def dtypes(self):
        """The 16-bit types that the kernels compute in."""
        return (torch.bfloat16, torch.float16) if self.bf16 else (torch.float16,)


# Properties that most rows of the table share; a row names those that differ.
AMPERE = {"bf16": True, "async_copies": True, "native_int4": True, "wgmma": False, "max_cluster": 1, "dependent_launch": False,
          "quantize_ranks": 128, "register_tiles": 0, "default_act_bits": 4, "fused_mlp": True, "generation": "Ampere"}
BLACKWELL = {"bf16": True, "async_copies": True, "native_int4": False, "wgmma": False, "max_cluster": 8, "dependent_launch": True,
             "quantize_ranks": 32, "register_tiles": 1, "default_act_bits": 8, "fused_mlp": False, "generation": "Blackwell"}


def row(number, shared, properties, **other):
    """A Target. shared: KiB of shared memory per SM and per CTA; properties: AMPERE or BLACKWELL; other: properties that differ from it."""
    per_sm, per_cta = shared
    return Target(number, per_sm << 10, per_cta << 10, **properties | other)


TARGETS = {target.number: target for target in (
    row(75, (64, 64), AMPERE, generation="Turing", bf16=False, async_copies=False, quantize_ranks=64, fused_mlp=False),     # RTX 20
    row(80, (164, 163), AMPERE, default_act_bits=8),                                                                        # A100
    row(86, (100, 99), AMPERE),                                                                                             # RTX 30
    row(87, (164, 163), AMPERE, default_act_bits=8),                                                                        # Orin
    row(89, (100, 99), AMPERE, generation="Ada"),                                                                           # RTX 40
    row(90, (228, 227), BLACKWELL, generation="Hopper", wgmma=True, max_cluster=16, register_tiles=2, measured=True),       # H100, H200
    row(100, (228, 227), BLACKWELL),                                                                                        # B200
    row(103, (228, 227), BLACKWELL),                                                                                        # B300
    row(110, (228, 227), BLACKWELL),                                                                                        # Thor
    row(120, (100, 99), BLACKWELL),                                                                                         # RTX 50
    row(121, (100, 99), BLACKWELL),                                                                                         # GB10
)}
OLDEST = min(TARGETS)


def for_capability(capability):
    """The Target of a compute capability such as (9, 0). Raises KernelsUnavailable for GPUs older than Turing.

    A GPU without a row gets the properties of the nearest older one, since a generation keeps what the previous one has. Exceptions:
    only Hopper has wgmma; shared memory has the smallest size of any GPU since Ampere; clusters have at most 8 CTAs; activations get 8
    bits, which is fast on every GPU; nothing was measured on it.
    """
    number = 10 * capability[0] + capability[1]
    if number < OLDEST:
        raise KernelsUnavailable(f"The CUDA kernels need an NVIDIA GPU of compute capability 7.5 (RTX 20) or newer; this one "
                                 f"has {capability[0]}.{capability[1]}.")
    if number in TARGETS:
        return TARGETS[number]
    older = TARGETS[max(known for known in TARGETS if known < number)]
    return replace(older, number=number, generation="this GPU", shared_per_sm=min(older.shared_per_sm, 100 << 10),
                   shared_per_cta=min(older.shared_per_cta, 99 << 10), wgmma=False, max_cluster=min(older.max_cluster, 8),
                   register_tiles=min(older.register_tiles, 1), default_act_bits=8, measured=False)


@functools.cache
def _for_index(index):
    target, properties = for_capability(torch.cuda.get_device_capability(index)), torch.cuda.get_device_properties(index)
    # PyTorch before 2.6 doesn't know them, and some integrated GPUs have none.
    clock, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))  # kHz, bits
    return replace(target, bandwidth=2 * clock * width / 8 / 1e6) if clock and width else target


def for_device(device):
    """The Target of a CUDA device. Raises KernelsUnavailable as for_capability does."""
    index = torch.device(device).index
    return _for_index(torch.cuda.current_device() if index is None else index)


@functools.lru_cache(maxsize=64)
def compute_dtype(dtype, layers, device):
    """The 16-bit type in which the kernels on `device` compute a layer, for x in `dtype` and the layer's floats in `layers`: x's type, or
    the layer's type if x is float32; fp16 if the GPU has no other. Raises KernelsUnavailable as for_capability does."""
    computed = for_device(device).dtypes
    return computed[0] if len(computed) == 1 else dtype if dtype in computed else layers


@functools.cache
def multiprocessors(device):
    """How many multiprocessors `device` has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def compiled_arch(arch, numbers):
    """The architecture that a compiler which knows only these compute capabilities can use for `arch`: `arch` itself, or the nearest older
    one of its family, whose machine code also runs (12.0's runs on 12.1). None if there is none."""
    number = int(re.fullmatch(r"sm_(\d+)[af]?", arch)[1])
    if number in numbers:
        return arch
    family = [other for other in numbers if other // 10 == number // 10 and other < number]
    return f"sm_{max(family)}" if family else None
