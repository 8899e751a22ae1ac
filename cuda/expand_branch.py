"""Low-rank branches in 8 bits (branch_bits of quant/layers/layout.py's LayerSpec), expanded to 16 bits by kernels/expand_branch.cu.

A branch takes half the memory, and the kernels of its layer stay as they are. A layer's op expands the branch in each call, or finds it
expanded: ahead_of() expands those of a whole block by one launch, since a launch takes longer than a layer's expansion.
"""

import functools
import threading

import torch

from . import dispatch, kernel_loader, reference, runtime, self_test, self_test_problems, targets
from .errors import KernelsUnavailable
from .operands import CODES_STEP

SOURCE, ENTRY = "expand_branch.cu", "expand_branch"
THREADS = 256  # threads of a CTA, as in expand_branch.cu; each expands CODES_STEP ranks of a row
LAYERS = 16    # layers of a launch for several
PIECE = 16     # bytes of a piece of the output
# The fields of expand_branch.cu's Branch, in their order.
FIELDS = ("proj_down", "proj_up", "scale", "offset", "first_cta", "down_pieces", "pieces", "row_pieces")
NO_LAYER = (0, 0, 0, 0, 2**31 - 1, 0, 0, 0)  # the FIELDS of a place of the table without a layer: no launch has so many CTAs
INSTEAD = "branches in 8 bits are expanded by PyTorch, which is slower"
_current = threading.local()  # block: the innermost Expanded that this thread has entered


def in_16_bits(operands):
    """LayerOperands whose low-rank branch is in 16 bits, in the type of the layer's scales: the operands themselves, or those with the
    expanded branch."""
    if operands.proj_scale is None:
        return operands
    down, up = expanded(operands.proj_down, operands.proj_up, operands.proj_scale, operands.weight_scale.dtype)
    return operands._replace(proj_down=down, proj_up=up, proj_scale=None)


def expanded(proj_down, proj_up, scale, dtype):
    """(proj_down (K, R), proj_up (N, R)) in `dtype`: reference.expand_branch of each, to the bit. Arguments as of expand()."""
    (k, rank), n = proj_down.shape, proj_up.shape[0]
    memory, begin = expand(proj_down, proj_up, scale, dtype)
    return matrix(memory, begin, k, rank), matrix(memory, begin + k * rank, n, rank)


def expand(proj_down, proj_up, scale, dtype):
    """(a tensor whose memory has the expanded branch, index of the first number there): the rows of proj_down, then those of proj_up. A
    view takes as long as a launch, and few kernels need one. It is called within an op, which a tracer doesn't see.

    proj_down: (K, R), proj_up: (N, R), int8, contiguous, R a multiple of CODES_STEP; scale: (K + N,) bf16, of the rows of proj_down and of
    proj_up. All on one device; dtype: bf16 or fp16. Nobody may write to the memory, which is a block's within ahead_of().
    """
    codes = proj_down.data_ptr(), proj_up.data_ptr(), scale.data_ptr()
    found = _found(codes, dtype)
    if found is not None:
        return found
    if dispatch.on_gpu(proj_down):
        try:
            launch, allocate = launcher(proj_down.shape[0], *proj_up.shape, dtype, proj_down.device)
            out = allocate()
            launch(out.data_ptr(), *codes)
            return out, 0
        except KernelsUnavailable:  # the layer's own call logs the reason
            pass
    return reference.expand_branch(torch.cat((proj_down, proj_up)), scale, dtype), 0


def expander(operands):
    """expand() of the branch of LayerOperands in 8 bits while it stays at its addresses, as a function without arguments; None if the
    branch is in 16 bits. The operands are on a CUDA device. Raises KernelsUnavailable."""
    if operands.proj_scale is None:
        return None
    dtype = operands.weight_scale.dtype
    launch, allocate = launcher(operands.proj_down.shape[0], *operands.proj_up.shape, dtype, operands.proj_down.device)
    codes = tuple(map(runtime.address, (operands.proj_down, operands.proj_up, operands.proj_scale)))

    def expand_again():
        found = _found(codes, dtype)
        if found is None:
            found = allocate(), 0
            launch(found[0].data_ptr(), *codes)
        return found

    return expand_again


@functools.lru_cache(maxsize=1024)
def launcher(k, n, rank, dtype, device):
    """(a function that launches the kernel for one branch, a function that allocates its output (K + N, R)), for the addresses of (output,
    proj_down, proj_up, scale). device: a CUDA device with an index. Raises KernelsUnavailable."""
    table = _sizes(k, n, rank)
    step = _kernel(dtype, 1, device).launcher((_ctas(k, n, rank),), (THREADS,), 2, pdl=True)
    # The kernel's second argument is the table, whose fields lie one behind the other from proj_down on.
    launch = runtime.chain(("out", *FIELDS[:3]), (step, ("out", FIELDS[0])), constants=dict(zip(FIELDS[3:], table)))
    return launch, runtime.allocator((k + n, rank), dtype, device)


def prepare(dtype, stored, device):
    """Compile, load and test the kernels for layers whose floats are stored in `stored`, in a model in `dtype`."""
    computed = targets.compute_dtype(dtype, stored, device)  # layers that are computed in fp16 are also held in it
    for layers in (1, LAYERS):
        _kernel(computed if computed == torch.float16 else stored, layers, device)


def defines_of(dtype, layers):
    return ("HALF", int(dtype == torch.float16)), ("LAYERS", layers)


def variants(target):
    """Every (source, entry, defines) that may be compiled for a Target."""
    return [(SOURCE, ENTRY, defines_of(dtype, layers)) for dtype in target.dtypes for layers in (1, LAYERS)]


# --- The branches of a block ---------------------------------------------------------------------------------------------


class Expanded:
    """A context manager. Within it expanded() and the functions of expander() find these branches, on the stream that expanded them.

    memory: (numbers,), of all branches; places: {addresses of (proj_down, proj_up, scale): index of the branch's first number}; stream: the
    stream's address.
    """

    __slots__ = ("memory", "places", "stream", "outer")

    def __init__(self, memory, places, stream):
        self.memory, self.places, self.stream, self.outer = memory, places, stream, None

    def __enter__(self):
        self.outer = getattr(_current, "block", None)
        _current.block = self

    def __exit__(self, *_):
        _current.block = self.outer


def ahead_of(codes, sizes, dtype, device):
    """A function without arguments that expands several branches, by a launch for every LAYERS of them, and returns their Expanded.

    codes: a tuple of the addresses of each branch's (proj_down, proj_up, scale), which must stay valid; sizes: (K, N, R) of each; dtype,
    device: of all. Raises KernelsUnavailable.
    """
    launch, offsets, size = _table(_kernel(dtype, LAYERS, device), LAYERS, codes, sizes)
    allocate, index = runtime.allocator((size // dtype.itemsize,), dtype, device), device.index
    places = {each: offset // dtype.itemsize for each, offset in zip(codes, offsets)}

    def expand():
        memory = allocate()
        launch(memory.data_ptr())
        return Expanded(memory, places, runtime.current_stream(index))

    return expand


def _found(codes, dtype):
    """expander()'s results for the branch at these addresses from the thread's Expanded, or None."""
    block = getattr(_current, "block", None)
    if block is None or (begin := block.places.get(codes)) is None:
        return None
    memory = block.memory
    if memory.dtype != dtype or runtime.current_stream(memory.get_device()) != block.stream:
        return None
    return memory, begin


def addresses(memory, begin, k, rank):
    """The addresses of proj_down (K, R) and of proj_up in what expand() returned."""
    down = memory.data_ptr() + begin * memory.itemsize
    return down, down + k * rank * memory.itemsize


def matrix(memory, begin, rows, rank):
    """The matrix (rows, rank) whose first number has this index."""
    return memory.as_strided((rows, rank), (rank, 1), begin)


def expand_by(branches, new, layers):
    """Launch the kernel for a table of `layers`, untested, and return the expanded branches (K + N, R). branches: (proj_down, proj_up,
    scale) of each; new(count): a tensor for so many numbers of their type."""
    sizes = [(down.shape[0], *up.shape) for down, up, _ in branches]
    total = runtime.laid_out(_bytes(sizes))[1] // 2
    out = new(total)
    kernel = kernel_loader.kernel(SOURCE, ENTRY, defines_of(out.dtype, layers), out.device)
    launch, offsets, _ = _table(kernel, layers, [tuple(map(runtime.address, branch)) for branch in branches], sizes)
    launch(out.data_ptr())
    return [out[offset // 2:][:(k + n) * rank].view(k + n, rank) for offset, (k, n, rank) in zip(offsets, sizes)]


def _table(kernel, layers, codes, sizes):
    """(a function that launches the kernel for all branches, of the address of their memory; their offsets there; the memory's bytes).
    layers: of the kernel's table."""
    offsets, size = runtime.laid_out(_bytes(sizes))
    steps, constants = [], {}
    for begin in range(0, len(codes), layers):
        table, ctas = [], 0
        for i in range(begin, min(begin + layers, len(codes))):
            table += (*codes[i], *_sizes(*sizes[i], offsets[i], ctas))
            ctas += _ctas(*sizes[i])
        table += NO_LAYER * (layers - len(table) // len(FIELDS))
        constants |= {(begin, place): field for place, field in enumerate(table)}
        steps.append((kernel.launcher((ctas,), (THREADS,), 2, pdl=True), ("out", (begin, 0))))
    return runtime.chain(("out",), *steps, constants=constants), list(offsets.values()), size


def _bytes(sizes):
    return {i: 2 * (k + n) * rank for i, (k, n, rank) in enumerate(sizes)}


def _sizes(k, n, rank, offset=0, first_cta=0):
    """The last FIELDS of a branch at an offset in bytes."""
    return offset // PIECE, first_cta, k * rank // CODES_STEP, (k + n) * rank // CODES_STEP, rank // CODES_STEP


def _ctas(k, n, rank):
    return -(-(k + n) * rank // (CODES_STEP * THREADS))


def _kernel(dtype, layers, device):
    """The kernel for a table of so many layers, tested. Raises KernelsUnavailable."""
    defines = defines_of(dtype, layers)
    kernel = kernel_loader.kernel(SOURCE, ENTRY, defines, device)
    check = functools.partial(self_test_problems.expand_branch_is_right, expand_by, layers, dtype, device)
    if not self_test.kernel_passes(SOURCE, device, check, defines, INSTEAD):
        raise KernelsUnavailable(f"The CUDA kernel {SOURCE} failed its self-test.")
    return kernel
