"""Hash the machine code of every variant of every kernel, to check that a change to the sources does not change it:

    python tests/cuda/sass_hashes.py before.txt                         before the change
    python tests/cuda/sass_hashes.py after.txt --against before.txt     after it

A line is a variant: architecture, source, entry, defines, hash, number of instructions, registers of a thread. Needs no GPU.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACK = "comfyui_svdquant"
ENCODING = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")  # half of an instruction's 128 bits, with its stalls and scoreboards


def load_pack():
    """Import the repository as a package, as conftest.py does for the tests."""
    root = HERE.parents[1]
    spec = importlib.util.spec_from_file_location(PACK, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


load_pack()

import sass  # noqa: E402
import variants  # noqa: E402
from comfyui_svdquant.cuda import compiler  # noqa: E402


def fingerprint(variant):
    """(arch, source, entry, defines) -> (sha256 of the machine code, number of instructions, registers of a thread).

    The hash covers each instruction's text and its 128 bits, so it also detects a change of the schedule alone. Labels are replaced by
    their order; the names of the kernel, its parameters and its sources are left out.
    """
    arch, source, entry, defines = variant
    compiled = compiler.compile_source(source, defines, arch)
    names, digest, count = {}, hashlib.sha256(), 0
    for line in sass.disassembly(compiled.cubin, entry, "-hex"):
        if match := sass.INSTRUCTION.search(line):
            text = "".join(part or "" for part in match.groups()).replace(entry, "kernel")
            digest.update(re.sub(r"\.L_\w+", lambda label: f"L{names.setdefault(label[0], len(names))}", text).encode())
            count += 1
        for bits in ENCODING.findall(line):
            digest.update(bits.encode())
    registers = re.search(r"Used (\d+) registers", compiled.log)
    return digest.hexdigest(), count, int(registers[1])


def source_digest(variant):
    """A hash of everything that a variant's fingerprint depends on: its options, and its source with the headers that it includes."""
    arch, source, entry, defines = variant
    texts, names = {}, [source]
    while names:
        name = names.pop()
        if name not in texts:
            texts[name] = (compiler.SOURCES / name).read_text(encoding="utf-8")
            names += re.findall(r'#include "([^"]+)"', texts[name])
    everything = arch, source, entry, defines, compiler.OPTIONS, compiler.nvrtc().version, sorted(texts.items())
    return hashlib.sha256(repr(everything).encode()).hexdigest()


def fingerprints(variants, jobs, cache):
    """[fingerprint] of the variants, with `jobs` compilers at a time. cache: a JSON file of the fingerprints of earlier runs, or None."""
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
    """The beginning of a variant's line: arch, source, entry, defines."""
    arch, source, entry, defines = variant
    return " ".join((arch, source, entry, ",".join(f"{name}={value}" for name, value in defines) or "-"))


def differences(lines, before):
    """Messages about lines "arch source entry defines sha256 instructions registers" that differ from the file `before`."""
    old = {line.rsplit(" ", 3)[0]: line.split(" ")[4:] for line in before.read_text().splitlines()}
    for line in lines:
        name, values = line.rsplit(" ", 3)[0], line.split(" ")[4:]
        if name not in old:
            yield f"{name}: not in {before.name}"
        elif old[name] != values:
            yield f"{name}: {old[name][1]} instructions and {old[name][2]} registers before, {values[1]} and {values[2]} now"


def main():
    parser = argparse.ArgumentParser(description="Hash the machine code of every variant of every kernel. Needs no GPU.")
    parser.add_argument("file", metavar="FILE", type=Path, help="the file to write")
    parser.add_argument("--against", metavar="FILE", type=Path, help="print the variants that differ from such a file")
    parser.add_argument("--arch", nargs="+", choices=sass.ARCHITECTURES, default=list(sass.ARCHITECTURES))
    parser.add_argument("--source", nargs="+", help="only kernels of these files, such as awq.cu")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="compile N variants at a time")
    parser.add_argument("--cache", metavar="FILE", type=Path, help="keep hashes here, and take those of unchanged sources from here")
    args = parser.parse_args()
    if reason := sass.missing():
        sys.exit(f"sass_hashes.py: {reason}")
    selected = []
    for arch in args.arch:
        of_arch = [variant for kernel in variants.variants(sass.ARCHITECTURES[arch]).values() for variant in kernel]
        selected += [(arch, *variant) for variant in dict.fromkeys(of_arch) if not args.source or variant[0] in args.source]
    lines = [f"{described(variant)} {' '.join(map(str, found))}"
             for variant, found in zip(selected, fingerprints(selected, args.jobs, args.cache))]
    args.file.write_text("".join(f"{line}\n" for line in lines))
    found = list(differences(lines, args.against)) if args.against else []
    print("\n".join([*found, f"{len(lines)} variants, {len(found)} differences" if args.against else f"{len(lines)} variants"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
