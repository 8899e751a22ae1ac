"""Time to load and to convert a full-size file, against the time to read it:  python benchmarks/files.py --comfyui ~/ComfyUI

The script writes a random FLUX.1-dev in 4 bits (this pack's layout; Nunchaku's INT4 and NVFP4) and measures each time in a new process.
`cold`: the file is not in the system's page cache; `warm`: all of it is, and the time is the median of three. "read in blocks" reads the
file through one buffer of 1 MiB; "safetensors" reads it tensor by tensor with safetensors' get_tensor, into new memory; "by tensor" does
so with this pack's reader, which is the least that a loader can do here. A virtual machine may have returned idle memory to its host, and
the first use of that memory takes several times as long. So before each measurement the process allocates and frees as much memory as the
file's size. Memory is the increase of the process's private memory, at its peak and at the end. Linux only; needs four times the file's
size on the disk, and twice in memory. Prints the tables, writes benchmarks/results/files_<processor>.json, and removes its files.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import safetensors
import torch
from machine import ROOT, description, load_pack

FULL_GB, DEPTH, HIDDEN, CONTEXT, POOLED = 6.66, 19, 3072, 4096, 768
BLOCK_BYTES = 1 << 20
WARM_TIMES = 3
FACTORS = ("weight_smooth_factor", "smooth", "smooth_orig")  # the last parts of smoothing factors' names, in ours and in Nunchaku's files
POOL = 1 << 24  # random numbers that fill every tensor repeatedly


# --- the files -----------------------------------------------------------------------------------------------------


def sizes(gb):
    """(hidden size, depth) of a FLUX.1 of about this many GB: full width with fewer blocks, or one block of less width."""
    blocks = DEPTH * gb / FULL_GB
    return (HIDDEN, round(blocks)) if blocks >= 1 else (max(128, int(HIDDEN * blocks**0.5) // 128 * 128), 1)


def linears(hidden, depth):
    """{name: (N, K)} of FLUX.1's linears, with twice as many single blocks as double ones."""
    found = {"img_in": (hidden, 64), "txt_in": (hidden, CONTEXT), "final_layer.linear": (64, hidden),
             "final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    for embedder, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", POOLED)):
        found |= {f"{embedder}.in_layer": (hidden, width), f"{embedder}.out_layer": (hidden, hidden)}
    for block in (f"double_blocks.{i}.{stream}" for i in range(depth) for stream in ("img", "txt")):
        found |= {f"{block}_mod.lin": (6 * hidden, hidden), f"{block}_attn.qkv": (3 * hidden, hidden),
                  f"{block}_attn.proj": (hidden, hidden), f"{block}_mlp.0": (4 * hidden, hidden), f"{block}_mlp.2": (hidden, 4 * hidden)}
    for block in (f"single_blocks.{i}" for i in range(2 * depth)):
        found |= {f"{block}.linear1": (7 * hidden, hidden), f"{block}.linear2": (hidden, 5 * hidden),
                  f"{block}.modulation.lin": (3 * hidden, hidden)}
    return found


class Random:
    """Tensors of any shape and type, at the cost of a copy."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.pools = {torch.int8: torch.randint(-128, 128, (POOL,), dtype=torch.int8, generator=generator)}
        floats = torch.randn(POOL, generator=generator) / 32
        self.pools |= {dtype: floats.to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)}

    def tensor(self, shape, dtype):
        pool = self.pools[dtype if dtype.is_floating_point else torch.int8]
        count = torch.Size(shape).numel() * dtype.itemsize // pool.itemsize
        return pool.repeat(-(-count // POOL))[:count].view(dtype).view(shape)

    def named(self, name, shape, dtype):
        """tensor, whose values the checks of a file take: smoothing factors are positive."""
        found = self.tensor(shape, dtype)
        return found.abs() + 1 if name.rpartition(".")[2] in FACTORS else found


def write_native(path, gb, rank):
    """A random FLUX.1 in this pack's layout, with scales like the quantizer's."""
    from comfyui_svdquant.cuda.row_scales import HIGHEST
    from comfyui_svdquant.quant.checkpoint import native
    from comfyui_svdquant.quant.checkpoint.int8_scales import product
    from comfyui_svdquant.quant.families.flux1 import FAMILY
    from comfyui_svdquant.quant.layers import layout
    from comfyui_svdquant.quant.quantizer.group_scales import four_bits

    hidden, depth = sizes(gb)
    shapes = linears(hidden, depth)
    specs = {name: layout.layer_spec(kind, name, shapes[name], kind.branches * rank, True, torch.bfloat16)
             for name in shapes if (kind := FAMILY.layer(name))}
    infos = {f"{name}.{part}": info for name, spec in specs.items() for part, info in spec.tensors().items()}
    for name in shapes.keys() - specs.keys():
        infos |= {f"{name}.weight": (shapes[name], torch.bfloat16), f"{name}.bias": (shapes[name][:1], torch.bfloat16)}
    norms = [name.removesuffix("qkv") + "norm" for name in specs if name.endswith("qkv")]
    norms += [f"single_blocks.{i}.norm" for i in range(2 * depth)]
    infos |= {f"{norm}.{kind}_norm.scale": ((128,), torch.bfloat16) for norm in norms for kind in ("query", "key")}
    random = Random()
    row_scales = {name: four_bits(random.tensor((spec.out_features,), spec.dtype).abs()) for name, spec in specs.items()
                  if spec.format != layout.AWQ}

    def tensor(name, shape, dtype):
        layer, _, part = name.rpartition(".")
        if part == "weight_scale" and layer in row_scales:
            return product(random.tensor(shape, torch.int8) % HIGHEST + 1, row_scales[layer])
        return random.named(name, shape, dtype)

    config = FAMILY.configuration.of({name: shape for name, (shape, _) in infos.items()})
    native.save_stream(path, infos, ((name, tensor(name, *info)) for name, info in infos.items()), specs, config, {}, "random",
                       row_scales=row_scales)


def write_nvfp4(path, int4):
    """A random Nunchaku NVFP4 file, with the names and widths of an INT4 one."""
    from comfyui_svdquant.quant.checkpoint import write
    from comfyui_svdquant.quant.checkpoint.header import read_header

    header, infos = read_header(int4), {}
    for name, info in header.tensors.items():
        part, _, leaf = name.rpartition(".")
        infos[name] = info.shape, info.dtype
        if leaf == "wscales" and f"{part}.wzeros" not in header.tensors:
            (groups, n), fused = info.shape, "qkv_proj" in part
            infos[name] = (groups * 4, n), torch.float8_e4m3fn  # groups of 16 columns for groups of 64
            infos[f"{part}.wcscales" if fused else f"{part}.wtscale"] = (n if fused else 1,), info.dtype
    random = Random()
    quantization = json.dumps({"method": "svdquant", "weight": {"dtype": "fp4_e2m1_all"}})
    write.write(path, infos, ((name, random.named(name, *info)) for name, info in infos.items()),
                header.metadata | {"quantization_config": quantization})


# --- measuring -----------------------------------------------------------------------------------------------------


def drop(path):
    """Drop a file from the system's page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def own_memory():
    """Bytes of the process's private memory, without mapped files."""
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\s*(\d+)", status.read())[1]) << 10


class Peak:
    """`gb`: the peak of the process's memory within the block, above its memory before."""

    def __enter__(self):
        self.before, self.highest, self.done = own_memory(), 0, threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        while not self.done.wait(0.005):
            self.highest = max(self.highest, own_memory())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.highest = max(self.highest, own_memory())

    @property
    def gb(self):
        return (self.highest - self.before) / 1e9


def touch_memory(count):
    """Allocate this many bytes and free them, so that the virtual machine holds that much memory."""
    np.empty(count, np.uint8)[::4096] = 0


def timed(run, path):
    """{"cold_s", "warm_s", "peak_gb", "end_gb"} of run(). Its result counts towards the memory at the end."""
    cold, *warm = (in_fork(once, run, path, cold) for cold in (True, *[False] * WARM_TIMES))
    return {"cold_s": cold["s"], "warm_s": statistics.median(row["s"] for row in warm)} | {key: cold[key] for key in ("peak_gb", "end_gb")}


def once(run, path, cold):
    touch_memory(os.path.getsize(path))
    if cold:
        drop(path)
    else:
        read_in_blocks(path)  # puts the whole file into the page cache, if memory suffices
    with Peak() as peak:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        end = own_memory() - peak.before
    del result
    return {"s": seconds, "peak_gb": peak.gb, "end_gb": end / 1e9}


def in_fork(function, *args):
    """function(*args) in a fork of this process, which has imported everything already."""
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe(duplex=False)
    process = context.Process(target=lambda: here.send(function(*args)))
    process.start()
    here.close()
    try:
        return there.recv()
    finally:
        process.join()


def read_in_blocks(path):
    block = bytearray(BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def read_by_tensor(path):
    from comfyui_svdquant.quant.checkpoint.header import read_header

    header = read_header(path)
    return [header.read_tensor(name) for name in header.tensors]


def read_by_safetensors(path):
    with safetensors.safe_open(path, "pt") as file:
        return [file.get_tensor(name).clone() for name in file.keys()]  # get_tensor gives a view of the mapped file


READING = {"read in blocks": read_in_blocks, "safetensors": read_by_safetensors, "by tensor": read_by_tensor}


def reading(path):
    load_pack()
    return {how: timed(functools.partial(read, path), path) for how, read in READING.items()}


def loading(path, comfyui):
    """Load as Load Model does, then read every weight once, since a mapped file is only read then."""
    sys.path.insert(0, comfyui)
    from host import launch

    launch.define_torchvision_ops()
    launch.define_torchaudio()
    from comfy.cli_args import args

    args.cpu = True  # the transfer to a GPU is not measured
    load_pack()
    from comfyui_svdquant.quant.host import loader

    def load():
        with torch.inference_mode():
            patcher = loader.load_model(path)
            for tensor in patcher.model.diffusion_model.state_dict().values():
                tensor.view(-1).view(torch.uint8)[::4096].sum()  # a byte of every page
        return patcher

    return timed(load, path)


def converting(source, target, to):
    load_pack()
    from comfyui_svdquant.quant.checkpoint.convert import convert

    with Peak() as peak:
        start = time.perf_counter()
        convert(source, target, to)
        return {"s": time.perf_counter() - start, "peak_gb": peak.gb}


def in_new_process(function, *args):
    """function(*args) in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(folder, gb, rank, comfyui):
    """{"files": {layout: GB}, "reading", "loading", "converting"}"""
    native, int4, back, nvfp4 = (str(folder / f"{name}.safetensors") for name in ("native", "int4", "back", "nvfp4"))
    load_pack()
    write_native(native, gb, rank)
    conversions = {}
    for name, source, target, to in (("native to nunchaku", native, int4, "nunchaku"), ("nunchaku to native", int4, back, "native")):
        conversions[name] = in_new_process(converting, source, target, to)
        print(f"{name}: {conversions[name]}", flush=True)
    os.remove(back)
    write_nvfp4(nvfp4, int4)
    read, loads = {}, {}
    paths = {"ours": native, "Nunchaku INT4": int4, "Nunchaku NVFP4": nvfp4}
    for name, path in paths.items():
        read[name], loads[name] = in_new_process(reading, path), in_new_process(loading, path, comfyui)
        print(f"{name}: {read[name]} {loads[name]}", flush=True)
    files = {name: os.path.getsize(path) / 1e9 for name, path in paths.items()}
    return {"files": files, "reading": read, "loading": loads, "converting": conversions}


def tables(found):
    """The result as Markdown."""
    head = ("load", "file", *READING, "**load**", "to safetensors", "to by tensor", "memory: peak, in the end")
    lines = ["warm / cold:", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, load in found["loading"].items():
        reading = found["reading"][name]
        pairs = [f"{times['warm_s']:.1f} / {times['cold_s']:.1f} s" for times in (*reading.values(), load)]
        ratios = [" / ".join(f"{load[key] / reading[how][key]:.2f}x" for key in ("warm_s", "cold_s"))
                  for how in ("safetensors", "by tensor")]
        cells = (name, f"{found['files'][name]:.2f} GB", *pairs[:-1], f"**{pairs[-1]}**", *ratios,
                 f"{load['peak_gb']:.2f}, {load['end_gb']:.2f} GB")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| convert | time | memory |", "|---|---|---|"]
    lines += [f"| {name} | {row['s']:.1f} s | {row['peak_gb']:.2f} GB |" for name, row in found["converting"].items()]
    return "\n".join(lines)


def processor():
    with open("/proc/cpuinfo") as file:
        return re.search(r"model name\s*: (.*)", file.read())[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="ComfyUI's folder")
    parser.add_argument("--gb", type=float, default=FULL_GB, help="about how large a file; %(default)s is a full FLUX.1")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--folder", help="folder for the temporary files, on a disk (default: the system's temporary folder)")
    parser.add_argument("--out", help="the result file; benchmarks/results/files_<processor>.json")
    args = parser.parse_args()
    result = description() | {"device": processor(), "cores": os.cpu_count(), "gb": args.gb, "rank": args.rank}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result |= measure(Path(folder), args.gb, args.rank, str(Path(args.comfyui).resolve()))
    print(tables(result))
    name = re.sub(r"\W+", "_", result["device"]).lower()
    with open(args.out or ROOT / "benchmarks" / "results" / f"files_{name}.json", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
