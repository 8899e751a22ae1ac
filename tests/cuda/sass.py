"""The machine code of a kernel variant, read from ptxas's log and from nvdisasm. This needs no GPU."""

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from comfyui_svdquant.cuda import compiler
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.cuda.targets import TARGETS

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
MMA = r"[HIQ]G?MMA"


@functools.cache
def nvdisasm():
    """Path of nvdisasm, from the PATH or NVIDIA's Python package; None if it is not installed."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(root).glob("*/bin/nvdisasm*")):
            return str(path)
    return None


def missing():
    """The reason why kernels can't be disassembled here, or None."""
    try:
        compiler.nvrtc()
    except KernelsUnavailable as error:
        return str(error)
    return None if nvdisasm() else "nvdisasm is not installed"


# {architecture: Target} that NVRTC compiles for.
ARCHITECTURES = {} if missing() else {t.arch: t for t in TARGETS.values() if t.number in compiler.nvrtc().architectures}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: "LDG.E.128.CONSTANT"
    operands: str
    predicated: bool


@dataclass(frozen=True)
class Listing:
    """One compiled variant."""

    instructions: list
    labels: dict  # {name: index of the instruction that follows}
    log: str      # ptxas's

    def count(self, pattern, span=None):
        """How many instructions in the range `span`, or everywhere, have an opcode that begins with the pattern."""
        begin, end = span or (0, len(self.instructions))
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions[begin:end])

    def loops(self):
        """(begin, end) of every backward branch's span."""
        for end, instruction in enumerate(self.instructions):
            begin = self.target(instruction)
            if begin is not None and begin < end:
                yield begin, end + 1

    def subroutines(self):
        """The real calls. A call of a plain label is a jump, and only diverged warps call __cuda_sm70_...sync."""
        return [i for i in self.instructions if i.opcode.startswith("CALL")
                and not re.search(r"\(\.L_|__cuda_sm70_\w*sync", i.operands)]

    def main_loop(self, mma=MMA):
        """The innermost loop with the most `mma`, which takes most of the kernel's time. None if no loop has any."""
        loops = [loop for loop in self.loops() if self.count(mma, loop)]
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        return max(inner, key=lambda loop: self.count(mma, loop), default=None)

    def slots(self, mma=MMA, avoid=None):
        """Instructions per `mma` on the longest path through the main loop; `avoid`: opcodes that the path must not contain."""
        begin, end = self.main_loop(mma)
        ways = {end: (0, 0)}  # {index: (instructions, MMAs) from there to the end of the loop, or None without a path}
        for index in reversed(range(begin, end)):
            instruction = self.instructions[index]
            target = self.target(instruction)
            after = [ways.get(target)] if target is not None and target > index else []
            if instruction.predicated or not instruction.opcode.startswith(("BRA", "EXIT", "RET")) or index == end - 1:
                after.append(ways[index + 1])
            best = max(filter(None, after), default=None)
            passable = best is not None and not (avoid and re.match(avoid, instruction.opcode))
            ways[index] = (best[0] + 1, best[1] + bool(re.match(mma, instruction.opcode))) if passable else None
        return ways[begin][0] / ways[begin][1]

    def target(self, instruction):
        """Index of a branch's target, or None."""
        label = re.search(r"\.L_\w+", instruction.operands) if instruction.opcode.startswith("BRA") else None
        return self.labels.get(label[0]) if label else None

    def number(self, pattern):
        found = re.search(pattern, self.log)
        return int(found[1]) if found else 0

    @property
    def registers(self):
        return self.number(r"Used (\d+) registers")

    @property
    def static_shared(self):
        """Bytes of static shared memory, without the dynamic shared memory of the launch."""
        return self.number(r"(\d+) bytes smem")


@functools.cache
def listing(source, entry, defines, arch):
    """Compile a variant as compiler.py does, and disassemble it."""
    return take_apart(compiler.compile_source(source, defines, arch), entry)


def disassembly(cubin, entry, *options):
    """nvdisasm's lines of the kernel `entry`, including the subroutines that ptxas put after it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.check_output([nvdisasm(), "-c", *options, str(path)], text=True)
    section = text.partition(f".text.{entry}:")[2]
    return re.split(r"(?m)^\s*\.section", section, maxsplit=1)[0].splitlines()


def take_apart(compiled, entry):
    """compiler.Compiled -> the Listing of its kernel `entry`."""
    instructions, labels = [], {}
    for line in disassembly(compiled.cubin, entry):
        if match := INSTRUCTION.search(line):
            instructions.append(Instruction(match[2], match[3].strip(), bool(match[1])))
        elif match := re.match(r"\s*(\.L_\w+):", line):
            labels[match[1]] = len(instructions)
    if not instructions:
        raise AssertionError(f"there is no kernel {entry}")
    return Listing(instructions, labels, compiled.log)
