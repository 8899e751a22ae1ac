"""Kernels taken apart: the machine code that ptxas makes of a variant, read from its log and from nvdisasm. Needs no GPU.

As a script it writes a line for every variant of every kernel, with a hash of its machine code, so that a change to the sources that
should leave the machine code alone can be checked:

    python tests/cuda/sass.py --hashes before.txt      before the change
    python tests/cuda/sass.py --hashes after.txt --against before.txt
"""

import argparse
import concurrent.futures
import functools
import hashlib
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = "comfyui_svdquant"
MODULES = ("gemm_mma", "gemm_wgmma", "quantize", "awq", "mlp", "gptq", "group_error")  # of cuda/: each lists its kernels' variants
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
ENCODING = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")  # half of an instruction's 128 bits, with its stalls and scoreboards
MMA = r"[HIQ]G?MMA"


def cuda_module(name):
    """A module of the pack's cuda/, which conftest.py or load_pack has imported."""
    return importlib.import_module(f"{PACK}.cuda.{name}")


@functools.cache
def nvdisasm():
    """Path of nvdisasm, from the PATH or NVIDIA's Python package; None where it is not installed."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(root).glob("*/bin/nvdisasm*")):
            return str(path)
    return None


def missing():
    """Why kernels can't be taken apart here, or None."""
    compiler = cuda_module("compiler")
    try:
        compiler.nvrtc()
    except compiler.KernelsUnavailable as error:
        return str(error)
    return None if nvdisasm() else "nvdisasm is not installed"


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
        """How many instructions have an opcode that begins with the pattern, in the range `span` or everywhere."""
        begin, end = span or (0, len(self.instructions))
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions[begin:end])

    def loops(self):
        """(begin, end) of every backward branch's span."""
        for end, instruction in enumerate(self.instructions):
            begin = self.target(instruction)
            if begin is not None and begin < end:
                yield begin, end + 1

    def subroutines(self):
        """The calls that run. A call of a plain label is a jump, and __cuda_sm70_...sync is for warps that have diverged."""
        return [i for i in self.instructions if i.opcode.startswith("CALL")
                and not re.search(r"\(\.L_|__cuda_sm70_\w*sync", i.operands)]

    def main_loop(self, mma=MMA):
        """The innermost loop with the most `mma`: the one that the kernel spends its time in. None where no loop has any."""
        loops = [loop for loop in self.loops() if self.count(mma, loop)]
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        return max(inner, key=lambda loop: self.count(mma, loop), default=None)

    def slots(self, mma=MMA, avoid=None):
        """Instructions for each `mma` on the longest way through the main loop; `avoid`: opcodes that it doesn't pass."""
        begin, end = self.main_loop(mma)
        ways = {end: (0, 0)}  # {index: (instructions, MMAs) from there to the end of the loop}, None where no way leads there
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
        """Index that a branch goes to, or None."""
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
        """Bytes of shared memory that the kernel declares; what the launch adds comes on top."""
        return self.number(r"(\d+) bytes smem")


@functools.cache
def listing(source, entry, defines, arch):
    """Compile a variant as compiler.kernel would, and take it apart."""
    return take_apart(cuda_module("compiler").compile_source(source, defines, arch), entry)


def disassembly(cubin, entry, *options):
    """nvdisasm's lines of the kernel `entry`, with the subroutines that ptxas put behind it."""
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


# --- The command line ------------------------------------------------------------------------------------------------


def load_pack(root):
    """Import the repository in the folder `root` as a package, as conftest.py does for the tests."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (root, Path(__file__).resolve().parent)]
    spec = importlib.util.spec_from_file_location(PACK, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def fingerprint(variant):
    """(arch, source, entry, defines) -> (sha256 of the machine code, number of instructions, registers of a thread).

    The hash is over each instruction's text and its 128 bits, so a change of the schedule alone shows. Labels count as their order;
    the kernel's name, the parameters' and the sources' have no part in it.
    """
    arch, source, entry, defines = variant
    compiled = cuda_module("compiler").compile_source(source, defines, arch)
    names, digest, count = {}, hashlib.sha256(), 0
    for line in disassembly(compiled.cubin, entry, "-hex"):
        if match := INSTRUCTION.search(line):
            text = "".join(part or "" for part in match.groups()).replace(entry, "kernel")
            digest.update(re.sub(r"\.L_\w+", lambda label: f"L{names.setdefault(label[0], len(names))}", text).encode())
            count += 1
        for bits in ENCODING.findall(line):
            digest.update(bits.encode())
    registers = re.search(r"Used (\d+) registers", compiled.log)
    return digest.hexdigest(), count, int(registers[1])


def source_digest(variant):
    """A hash of everything that a variant's fingerprint depends on: its options, and its source with the headers that it includes."""
    compiler = cuda_module("compiler")
    arch, source, entry, defines = variant
    texts, wanted = {}, [source]
    while wanted:
        name = wanted.pop()
        if name not in texts:
            texts[name] = (compiler.SOURCES / name).read_text(encoding="utf-8")
            wanted += re.findall(r'#include "([^"]+)"', texts[name])
    everything = arch, source, entry, defines, compiler.OPTIONS, compiler.nvrtc().version, sorted(texts.items())
    return hashlib.sha256(repr(everything).encode()).hexdigest()


def fingerprints(variants, jobs, cache):
    """[fingerprint] of the variants, by `jobs` compilers at a time. cache: a JSON file of those known from earlier runs, or None."""
    known = json.loads(cache.read_text()) if cache and cache.exists() else {}
    keys = {variant: source_digest(variant) for variant in variants}
    missing = [variant for variant in variants if keys[variant] not in known]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done, (variant, found) in enumerate(zip(missing, pool.map(fingerprint, missing)), 1):
            known[keys[variant]] = found
            if sys.stderr.isatty():
                print(f"\r{done} / {len(missing)}", end="", file=sys.stderr, flush=True)
            if cache and (done % 20 == 0 or done == len(missing)):
                cache.write_text(json.dumps(known))
    return [tuple(known[keys[variant]]) for variant in variants]


def described(variant):
    """A variant as the beginning of its line: arch, source, entry, defines."""
    arch, source, entry, defines = variant
    return " ".join((arch, source, entry, ",".join(f"{name}={value}" for name, value in defines) or "-"))


def differences(lines, before):
    """Messages about lines of "arch source entry defines sha256 instructions registers" that are not those of the file `before`."""
    old = {line.rsplit(" ", 3)[0]: line.split(" ")[4:] for line in before.read_text().splitlines()}
    for line in lines:
        name, values = line.rsplit(" ", 3)[0], line.split(" ")[4:]
        if name not in old:
            yield f"{name}: not in {before.name}"
        elif old[name] != values:
            yield f"{name}: {old[name][1]} instructions and {old[name][2]} registers before, {values[1]} and {values[2]} now"


def main():
    parser = argparse.ArgumentParser(description="Hash the machine code of every variant of every kernel. Needs no GPU.")
    parser.add_argument("--hashes", metavar="FILE", type=Path, required=True,
                        help="file to write: arch, source, entry, defines, sha256, instructions and registers of a variant a line")
    parser.add_argument("--against", metavar="FILE", type=Path, help="print the variants that differ from such a file")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--source", nargs="+", help="only kernels of these files, such as awq.cu")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth variant of each architecture")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="compile N variants at a time")
    parser.add_argument("--cache", metavar="FILE", type=Path, help="keep hashes here, and take those of unchanged sources from here")
    parser.add_argument("--pack", metavar="FOLDER", type=Path, default=ROOT, help="the checkout to hash; default: this one")
    args = parser.parse_args()
    load_pack(args.pack.resolve())
    if reason := missing():
        sys.exit(f"sass.py: {reason}")
    variants = []
    for arch in args.arch:
        found = dict.fromkeys((arch, *variant) for name in MODULES for variant in cuda_module(name).variants(arch))
        variants += [variant for variant in found if not args.source or variant[1] in args.source][::args.every]
    lines = [f"{described(variant)} {' '.join(map(str, found))}"
             for variant, found in zip(variants, fingerprints(variants, args.jobs, args.cache))]
    args.hashes.write_text("".join(f"{line}\n" for line in lines))
    found = list(differences(lines, args.against)) if args.against else []
    print("\n".join([*found, f"{len(lines)} variants, {len(found)} differences" if args.against else f"{len(lines)} variants"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
