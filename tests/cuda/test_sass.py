"""ptxas's machine code of every kernel for every architecture, read without a GPU: causes of a slow kernel are found here first.

A new kernel needs one line in KERNELS and one in variants.py; a new GPU needs only its row in cuda/targets.py.
"""

import functools
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
from comfyui_svdquant.cuda import (
    awq,
    block_ops,
    compiler,
    expand_branch,
    gemm_mma,
    gptq,
    group_error,
    mlp,
    put,
    quantize_activation,
    rms_ops,
)
from comfyui_svdquant.cuda.activation_layout import CodeStorage

from . import sass
from .variants import variants as all_variants

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))

REGISTERS = 65536  # of an SM, in all architectures
FULLY = ("sm_80", "sm_89")  # generations of which every variant is compiled, also where time is short


@dataclass(frozen=True)
class Kernel:
    """The properties of every variant of a kernel, as functions of its defines (a dict) and the architecture."""

    threads: Callable  # threads of a CTA
    ctas: Callable     # CTAs that are planned on an SM, whose registers must suffice for all of them
    mma: Callable      # (pattern of the opcodes, divisor of their number in the main loop); None: no tensor cores


def awq_mma(defines, arch):
    """A group has, for each tile of tokens, four MMAs for each 16 rows' codes, and four for the tokens' sums. Turing's have half the K."""
    return (r"HMMA\.1688\." if arch == "sm_75" else r"HMMA\.16816\."), (2 if arch == "sm_75" else 1) * 12 * defines["TILES"]


def gemm_mma_mma(defines, arch):
    """For a group, a warp has 4 x TILES tiles of 16 x 8, with two steps of K in 8 bits. In 4 bits it has one step, which exists twice, for
    signed and for unsigned activations. Turing's MMAs are 8 x 8, with half the K."""
    if defines["CODES"] == CodeStorage.INT4_NIBBLES:
        opcode = r"IMMA\.8832\.[SU]4\.[SU]4" if arch == "sm_75" else r"IMMA\.16864\.[SU]4\.[SU]4"
    else:
        opcode = r"IMMA\.8816\.S8\.S8" if arch == "sm_75" else r"IMMA\.16832\.S8\.S8"
    return opcode, (4 if arch == "sm_75" else 1) * 2 * 4 * defines["TILES"]


def gemm_wgmma_mma(defines, arch):
    return r"IGMMA\.64x\d+x32\.S8\.S8", 4


def quantize_threads(defines, arch):
    return 32 * (defines["WARPS"] + (defines["TILES"] == 1)) if "WARPS" in defines else 128 * defines["TILES"]


def quantize_ctas(defines, arch):
    return quantize_activation.resident_ctas(quantize_threads(defines, arch) // 32, defines["RANKS"]) if "WARPS" in defines else 1


def quantize_mma(defines, arch):
    return (r"HMMA\.", 1) if defines["RANKS"] else None


def mlp_mma(defines, arch):
    return gemm_mma_mma(defines, arch) if "NEXT" in defines else None


KERNELS = {
    "awq": Kernel(lambda d, a: 32 * awq.WARPS, lambda d, a: 5 if d["TILES"] == 1 else 1, awq_mma),
    "expand_branch": Kernel(lambda d, a: expand_branch.THREADS, lambda d, a: 4, lambda d, a: None),
    "gemm_mma": Kernel(lambda d, a: 32 * d["ROW_WARPS"] * d["TOKEN_WARPS"], lambda d, a: 1, gemm_mma_mma),
    "gemm_wgmma": Kernel(lambda d, a: 2 * d["ROWS"] + 128, lambda d, a: 1, gemm_wgmma_mma),
    "gptq": Kernel(lambda d, a: 32 * gptq.WARPS, lambda d, a: 1, lambda d, a: None),
    "group_error": Kernel(lambda d, a: group_error.THREADS, lambda d, a: 4, lambda d, a: None),
    "mlp": Kernel(lambda d, a: 32 * d["ROW_WARPS"] * d["TOKEN_WARPS"] if "NEXT" in d else mlp.PARTIAL_SUMS_THREADS,
                  lambda d, a: 1, mlp_mma),
    "modulate": Kernel(lambda d, a: 32 * (d["TEAM"] if d["TEAM"] > 1 else block_ops.WARPS), lambda d, a: 1,
                       lambda d, a: None),
    "put": Kernel(lambda d, a: put.THREADS, lambda d, a: 1, lambda d, a: None),
    "qk_norm_rope": Kernel(lambda d, a: block_ops.ROPE_THREADS, lambda d, a: 4, lambda d, a: None),
    "quantize": Kernel(quantize_threads, quantize_ctas, quantize_mma),
    "rms_modulate": Kernel(lambda d, a: 32 * (d["TEAM"] if d["TEAM"] > 1 else block_ops.WARPS), lambda d, a: 1, lambda d, a: None),
    "swiglu": Kernel(lambda d, a: rms_ops.SWIGLU_THREADS, lambda d, a: 4, lambda d, a: None),
}


def in_fp16(arch):
    """Whether the tests compile for fp16. They compile for one type only, since the two differ in a few conversions: fp16 without bf16, and
    on sm_86, which otherwise equals sm_89."""
    return arch in ("sm_75", "sm_86")


def alike(arch):
    """Whether the table has an older GPU with the same properties that is compiled for the same type. A few variants then represent all."""
    target = sass.ARCHITECTURES[arch]
    return any(older.number < target.number and replace(older, number=target.number) == target and in_fp16(older.arch) == in_fp16(arch)
               for older in sass.ARCHITECTURES.values())


@functools.cache
def variants(name, arch):
    """The variants of a kernel that are compiled: all of one type, or only the first and the last one if an older GPU is alike, and on
    generations that FULLY leaves out unless SVDQUANT_HEAVY_TESTS is set."""
    few = alike(arch) or arch not in FULLY and not os.environ.get("SVDQUANT_HEAVY_TESTS")
    found = [v for v in all_variants(sass.ARCHITECTURES[arch])[name] if dict(v[2]).get("HALF", in_fp16(arch)) == in_fp16(arch)]
    return list(dict.fromkeys((found[0], found[-1]))) if found and few else found


def listings(name, arch):
    """[(text of the variant, its defines, its listing)] of variants()."""
    return compiled(variants(name, arch), arch)


def compiled(found, arch):
    """[(text of the variant, its defines, its listing)] of these variants, compiled in parallel."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda v: sass.listing(*v, arch), found))
    return [(" ".join([v[0], *(f"{key}={value}" for key, value in v[2])]), dict(v[2]), listing) for v, listing in zip(found, done)]


# In gemm_mma.cu's large tile ptxas keeps one or two registers in local memory from before the loops until after them: one to five of 2300
# to 3600 instructions. For int8 codes a ring of two stages would avoid it; whether that is faster than three has not been measured.
# {(codes, LORA, or None for both values): architectures}
SPILLS = {(CodeStorage.INT8, None): ("sm_87", "sm_90a"), (CodeStorage.INT4_BYTES, 1): ("sm_100", "sm_110")}


def spills(defines, arch):
    """Whether the variant is known to spill, outside its loops."""
    return defines.get("TILES") == gemm_mma.LARGE.tiles and any(
        arch in architectures and defines.get("CODES") == codes and lora in (None, defines.get("LORA"))
        for (codes, lora), architectures in SPILLS.items())


def problems(kernel, defines, listing, arch):
    """Yield the problems of one variant, as text."""
    if calls := {i.operands for i in listing.subroutines()}:
        yield f"calls {', '.join(sorted(calls))}"
    local = listing.count("LDL|STL")
    if spills(defines, arch):
        looped = sum(listing.count("LDL|STL", loop) for loop in listing.loops())
        if looped or not 0 < local <= 5:
            yield f"{local} accesses to local memory, {looped} of them in loops; expected one to five and none"
    else:
        if local:
            yield f"{local} accesses to local memory"
        yield from compiler.complaints(listing.log)
    threads, ctas = kernel.threads(defines, arch), kernel.ctas(defines, arch)
    if -(-listing.registers // 8) * 8 * threads * ctas > REGISTERS:
        yield f"{listing.registers} registers: {ctas} CTAs of {threads} threads don't fit"
    shared = listing.static_shared + defines.get("SHARED_BYTES", 0)
    if shared > sass.ARCHITECTURES[arch].shared_per_cta or listing.static_shared > 48 << 10:
        yield f"{shared} bytes of shared memory, {listing.static_shared} of them static"
    expected = kernel.mma(defines, arch)
    if expected is None:
        if listing.count(sass.MMA):
            yield "tensor cores without a use for them"
        return
    opcode, number = expected
    loop = listing.main_loop()
    if loop is None and defines.get("LOOP") != 0:
        yield "no loop with tensor cores"
        return
    found, all_found = listing.count(opcode, loop), listing.count(sass.MMA, loop)
    if found != all_found or found % number:
        yield f"{all_found} MMAs in the main loop, {found} of them {opcode}; expected a multiple of {number}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name, arch):
    """No calls, no local memory, no spills, no serialized wgmma; registers and shared memory as planned, the MMAs native."""
    found = [f"{text}: {problem}" for text, defines, listing in listings(name, arch)
             for problem in problems(KERNELS[name], defines, listing, arch)]
    assert not found, f"{arch}:\n" + "\n".join(found)


ACTIVATED = {  # number of a lane's outputs with GELU
    "gemm_mma": lambda d: d["GELU"] * 16 * d["TILES"], "gemm_wgmma": lambda d: d["GELU"] * d["TOKENS"] // 2 // d["SPLIT"],
    "mlp": lambda d: 16 * d["TILES"] if "NEXT" in d else 0}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name in ACTIVATED for arch in sass.ARCHITECTURES if variants(name, arch)])
def test_gelu_is_one_tanh_per_output(name, arch):
    """MUFU is the slowest unit: an output with GELU takes one of its instructions, a kernel without GELU none."""
    for text, defines, listing in listings(name, arch):
        assert listing.count(r"MUFU\.TANH") == ACTIVATED[name](defines), text


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89"])
def test_int4_issue_slots(arch):
    """The number of instructions per 4-bit MMA of the largest tile, with the rescaling of every group. On sm_86 and sm_89 an MMA takes 16
    clocks, in which a scheduler issues 16 instructions. Nunchaku's loop has 13.3 on sm_89 and 17.3 on sm_80."""
    tile = max(gemm_mma.tiles_of(sass.ARCHITECTURES[arch]), key=lambda tile: tile.tiles)
    found = [v for v in all_variants(sass.ARCHITECTURES[arch])["gemm_mma"] for defines in [dict(v[2])]
             if defines["CODES"] == CodeStorage.INT4_NIBBLES and defines["TILES"] == tile.tiles and defines["HALF"] == in_fp16(arch)]
    slots = {(text, other): listing.slots(avoid=other) for text, _, listing in compiled(found, arch)
             for other in (r"IMMA\S+[.]U4", r"IMMA\S+S4[.]S4")}  # the signed path, the unsigned path
    print(slots)
    assert slots and max(slots.values()) < 13.3, slots


@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_no_emulated_mma(arch):
    """ptxas emulates an MMA that the architecture doesn't have by a subroutine, which the helper module must find."""
    source = """extern "C" __global__ void k(int* p) {
      int d[4] = {}; unsigned a = p[0];
      asm volatile("mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                   : "+r"(d[0]), "+r"(d[1]) : "r"(a), "r"(a));
      p[threadIdx.x] = d[0] + d[1]; }"""
    listing = sass.take_apart(compiler.nvrtc().compile("k.cu", source, {}, (f"-arch={arch}", "--ptxas-options=-v")), "k")
    native = sass.ARCHITECTURES[arch].native_int4
    assert bool(listing.count(r"IMMA\.8832\.S4")) == native
    assert native == (not list(listing.subroutines()) and not re.search("internal", listing.log))


def test_the_helper_finds_spills_and_loops():
    source = """extern "C" __global__ void __launch_bounds__(1024, 2) k(float* p, int n) {
      float v[64];
      #pragma unroll
      for (int i = 0; i < 64; i++) v[i] = p[i * n + threadIdx.x];
      for (int t = 0; t < n; t++)
        #pragma unroll
        for (int i = 0; i < 64; i++) v[i] = v[i] * v[(i + 7) % 64] + v[(i + 31) % 64];
      #pragma unroll
      for (int i = 0; i < 64; i++) p[i * n + threadIdx.x] = v[i]; }"""
    compiled = compiler.nvrtc().compile("k.cu", source, {}, ("-arch=sm_89", "--ptxas-options=-v"))
    listing = sass.take_apart(compiled, "k")
    assert compiler.complaints(compiled.log) and listing.count("LDL|STL") and listing.registers <= 64
    begin, end = max(listing.loops(), key=lambda loop: loop[1] - loop[0])
    assert listing.count("FFMA", (begin, end)) == 64 * round(listing.count("FFMA", (begin, end)) / 64) > 0
    assert listing.main_loop() is None


def test_awq_reads_nothing_before_the_previous_kernel_has_ended():
    """The compiler may move reads of memory that it considers constant, but not before the wait."""
    for name, _, listing in listings("awq", "sm_90a"):
        opcodes = [i.opcode for i in listing.instructions]
        first = next(i for i, opcode in enumerate(opcodes) if opcode.startswith(("LDG", "STG")))
        assert "ACQBULK" in opcodes[:first], name
