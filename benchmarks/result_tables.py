"""The tables that tables.py writes, each made from one kind of result file. A row or column that no result has is left out.

Each function takes a tables.Results and, if the files are of one machine, that machine's name in them; it returns lines of Markdown.
"""

import re

import files
import layer_error
import linears
import memory_caps
import picture_sources
import pictures

# {beginning of a result file's name: the command that writes it}
COMMANDS = {
    "compile": "python benchmarks/overhead.py --compile --out FILE",
    "demo": "make demo",
    "family_step": "python benchmarks/family_step.py --comfyui PATH",
    "files": "python benchmarks/files.py --comfyui PATH",
    "flux_step": "python benchmarks/flux_step.py --comfyui PATH",
    "layer_error_k1024_mild": "python benchmarks/layer_error.py --mild",
    "layer_error_k12288": "python benchmarks/layer_error.py --k 12288 --n 3072 --seeds 1",
    "layer_error_k3072": "python benchmarks/layer_error.py --k 3072 --n 3072 --seeds 1",
    "linears": "python benchmarks/linears.py",
    "lora_cost": "python benchmarks/lora_cost.py --comfyui PATH",
    "memory_caps": "python benchmarks/memory_caps.py --comfyui PATH",
    "overhead": "python benchmarks/overhead.py --out FILE",
    "picture_sources": "python benchmarks/picture_sources.py --comfyui PATH --prompts 3 --steps 6 --batch 3",
    "pictures_knobs": "python benchmarks/pictures.py --comfyui PATH --knobs --prompts 64 --batch 64",
    "pictures_tiny": "python benchmarks/pictures.py --comfyui PATH --model FILE --prompts 64",
    "pictures": "python benchmarks/pictures.py --comfyui PATH --prompts 128 --batch 64",
    "quantize_full": "python benchmarks/quantize_full.py --comfyui PATH --model MODEL --vram-gb GB",
    "several_gpus": "python benchmarks/several_gpus.py --comfyui PATH --blocks 5,10",
    "dynamic_vram": "python benchmarks/dynamic_vram.py --comfyui PATH",
    "text_encoder": "python benchmarks/text_encoder.py --comfyui PATH",
}
MODELS = {"bf16": "bf16", "fp8": "fp8, a scale a row (torchao's scheme)", "comfyui-fp8": "fp8, ComfyUI's own with --fast",
          "nf4": "NF4 (bitsandbytes)", "ours": "**4 bits, W4A8**", "ours-fused": "**4 bits, W4A8, fused blocks**",
          "ours-fused-16-bit-branch": "4 bits, W4A8, fused blocks, branches of rank 32 in 16 bits",
          "ours-w4a4": "4 bits, W4A4"}
MODES = {"eager": "", "compiled": ", torch.compile", "graph": ", CUDA graph"}
FAMILIES = {"flux2": "FLUX.2", "qwen-image": "Qwen-Image", "z-image": "Z-Image"}  # models that train_families.py trains
FAMILY_MODELS = {"flux2-klein-9b": "FLUX.2 klein 9B", "flux2-klein-4b": "FLUX.2 klein 4B", "flux2-dev": "FLUX.2 dev",
                 "qwen-image": "Qwen-Image", "z-image": "Z-Image"}
QUANTIZED = {"flux1-dev": "FLUX.1 dev", **FAMILY_MODELS}
FAMILY_VARIANTS = {"bf16-eager": "bf16", "fp8-compiled": "fp8, a scale a row, torch.compile",
                   "ours-plain": "4 bits, W4A8, in ComfyUI's own blocks", "ours-eager": "**4 bits, W4A8**", "ours-w4a4": "4 bits, W4A4"}
ENCODERS = {"t5xxl": "T5-XXL", "qwen25-7b": "Qwen2.5-VL 7B", "qwen3-4b": "Qwen3 4B", "mistral-24b": "Mistral Small 24B",
            "gemma2-2b": "Gemma 2 2B"}
ENCODER_VARIANTS = {"16-bit": "bf16", "fp8-scaled": "fp8 with one scale a weight", "ours": "**4 bits**"}
KERNELS = {"gemm": "matrix products", "awq": "W4A16"}
CAPPED = {"4 bits": "**4 bits, W4A8**", "fp8": "fp8 weights, ComfyUI's own, computed in bf16", "bf16": "bf16"}
LORAS = {"rank 16, q k v apart": "one of rank 16, with factors of their own for q, k and v",
         "rank 64, q k v apart": "one of rank 64, with factors of their own for q, k and v", "3 of rank 32": "three of rank 32"}
README_RECIPES = {"naive rounding": "plain rounding", pictures.BASE: "DeepCompressor's default", pictures.GPTQ: "DeepCompressor with GPTQ",
                  "ours: data-free": "this pack, `data-free`", "ours: fast": "this pack, `fast`", pictures.OURS: "**this pack, `best`**",
                  "ours: slow": "this pack, `slow`"}
OFFLOADED = {"4 bits": "**4 bits, W4A8**", "bf16": "bf16", "float8_e4m3fn": "fp8, ComfyUI's own", "asym_w4a8_int8": "4 bits, ComfyUI's own"}
STANDARD = 1024, 1  # pixels and batch of the sizes that the README shows


def table(head, rows):
    """Lines of a Markdown table without the columns that are empty in every row."""
    kept = [column for column in range(len(head)) if column == 0 or any(row[column] for row in rows)]
    return [f"| {' | '.join(row[column] for column in kept)} |" for row in (head, ["---"] * len(head), *rows)]


def without_empty_columns(lines):
    """The same table without the columns that are empty in every row."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return table(head, rows)


def entries(result):
    """The entries of a flux_step result, one a variant and size, this pack's last."""
    return sorted(result["entries"], key=lambda entry: entry["variant"].startswith("ours"))


def branches(entry):
    """The words for the branches of an entry that was measured before they had 8 bits and twice the rank."""
    old = entry.get("rank") == 32 and re.search(r"\bours\b", entry["variant"])
    return ", branches of rank 32 in 16 bits" if old else ""


def label(entry):
    """The words for an entry's variant."""
    model, _, mode = entry["variant"].rpartition("-")
    return MODELS.get(model, model) + ("" if model.endswith("16-bit-branch") else branches(entry)) + MODES.get(mode, f", {mode}")


def summary(results, gpu):
    """The README's first table: speed, memory and closeness of FLUX.1 dev."""
    standard = {entry["variant"]: entry for entry in entries(results(f"flux_step_{gpu}"))
                if (entry["pixels"], entry["batch"]) == STANDARD and "ms" in entry}
    demo = results("demo_cpu")["mean_psnr"]
    own = next(name for name in ("ours-fused-eager", "ours-eager") if name in standard)
    rows = []
    for name, title in (("bf16-eager", "16 bits (bf16)"), ("comfyui-fp8-eager", "8 bits (ComfyUI's fp8)"), (own, "**4 bits (W4A8)**")):
        if (entry := standard.get(name)) is None:
            continue
        cells = ["FLUX.1 dev", title, gpu.upper(), f"{entry['weights_gb']:.1f} GB", f"{entry['peak_gb']:.1f} GB", f"{entry['ms']:.0f} ms"]
        rows.append([*cells, f"{demo['SVDQuant']:.1f} dB" if name == own else ""])
    head = ["model", "precision", "card", "weights", "GPU memory", "a step", "PSNR to bf16"]
    return [*table(head, rows), "",
            "A step is one pass of the model over a picture of 1024 x 1024, of which FLUX.1 dev takes about 20. PSNR says how close a "
            "picture is to the 16-bit one: the mean of the eight pictures above, which a CPU drew in W4A4; plain rounding to 4 bits "
            f"reaches {demo['naive 4-bit']:.1f} dB."]


def step_rows(found, sized):
    """Rows of a table of flux_step's entries. sized: whether they begin with the size."""
    kinds = list(dict.fromkeys(kind for entry in found for kind in entry.get("kernel_ms", {})))
    rows = []
    for entry in found:
        size = [f"{entry['pixels']} x {entry['pixels']}, batch {entry['batch']}"] if sized else []
        if "not_measured" in entry:
            rows.append([*size, label(entry), entry["not_measured"], *[""] * (4 + len(kinds))])
            continue
        warm = f"{entry['first_warm_s']:.1f} s" if "first_warm_s" in entry else ""
        rows.append([*size, label(entry), f"{entry['ms']:.1f}", f"{entry['first_s']:.1f} s", warm,
                     f"{entry['weights_gb']:.2f} GB", f"{entry['peak_gb']:.2f} GB",
                     *(f"{entry['kernel_ms'][kind]:.1f}" if kind in entry.get("kernel_ms", {}) else "" for kind in kinds)])
    return rows, kinds


STEP_HEAD = ["ms a step", "first step", "with compiled kernels", "weights", "peak memory"]


def step(results, gpu):
    """A step at the README's size, in the precisions that somebody would choose on that GPU."""
    found = [entry for entry in entries(results(f"flux_step_{gpu}"))
             if (entry["pixels"], entry["batch"]) == STANDARD and not entry["variant"].startswith("ours-w4a4")]
    rows, kinds = step_rows([entry | {"kernel_ms": {}} for entry in found], False)
    return table(["1024 x 1024, batch 1", *STEP_HEAD], rows)


def steps(results, gpu):
    """A step at every size, with the time of the kernels by kind where it was measured."""
    found = sorted(entries(results(f"flux_step_{gpu}")), key=lambda entry: (entry["pixels"], entry["batch"]))
    rows, kinds = step_rows(found, True)
    return table(["size", "precision", *STEP_HEAD, *(f"{KERNELS.get(kind, kind)}, ms" for kind in kinds)], rows)


def families(results, gpu):
    """A step of full-size models of the newer families."""
    rows = []
    for model, title in FAMILY_MODELS.items():
        found = {entry["variant"].removeprefix(f"{model} "): entry for entry in results(f"family_step_{gpu}")["entries"]
                 if entry["variant"].startswith(f"{model} ")}
        base = found.get("bf16-eager", {}).get("ms")
        rows += [[title, name + branches(entry), f"{entry['ms']:.1f}", f"{base / entry['ms']:.2f}x" if base else "",
                  f"{entry['first_s']:.1f} s", f"{entry['weights_gb']:.2f} GB", f"{entry['peak_gb']:.2f} GB"]
                 for variant, name in FAMILY_VARIANTS.items() if (entry := found.get(variant))]
    return table(["model, 1024 x 1024", "precision", "ms a step", "faster than bf16", "first step", "weights", "peak memory"], rows)


def family_pictures(results, gpu):
    """PSNR of the pictures of small models of the newer families, by recipe."""
    rows = []
    for family, title in FAMILIES.items():
        found = results(f"pictures_tiny_{family}_{gpu}")["results"]
        for name in (*pictures.FLOOR, *README_RECIPES):
            if name in found:
                cells = [pictures.cell(found, name, bits, measure, pictures.BASE) for bits in pictures.BITS for measure in ("psnr", "gain")]
                rows.append([title, README_RECIPES.get(name, name), *cells])
    return table(["model", "recipe", "W4A4, dB", "to DeepCompressor's default, W4A4, dB (95 % interval)", "W4A8, dB", "to the same"], rows)


def encoders(results, gpu):
    """One prompt through text encoders."""
    found = {tuple(entry[key] for key in ("encoder", "variant", "tokens")): entry for entry in results(f"text_encoder_{gpu}")["entries"]}
    counts = sorted({tokens for *_, tokens in found})
    rows = []
    for encoder, title in ENCODERS.items():
        for variant, name in ENCODER_VARIANTS.items():
            measured = {tokens: found[encoder, variant, tokens] for tokens in counts if (encoder, variant, tokens) in found}
            if measured:
                first = next(iter(measured.values()))
                cosine = min(entry["cosine"] for entry in measured.values())
                rows.append([title, name, f"{first['megabytes'] / 1e3:.2f} GB", *(f"{measured[tokens]['ms']:.1f}" if tokens in measured
                             else "" for tokens in counts), "" if variant == "16-bit" else f"{cosine:.4f}",
                             f"{first['seconds_to_pack']:.0f} s" if variant == "ours" else ""])
    times = [f"{tokens} tokens, ms" for tokens in counts]
    return table(["text encoder", "weights", "memory", *times, "cosine to bf16", "to quantize"], rows)


def caps(results, gpu):
    """A step by the GPU memory that ComfyUI may use."""
    variants = {CAPPED[name]: results(f"memory_caps_{gpu}")["variants"][name] for name in CAPPED
                if name in results(f"memory_caps_{gpu}")["variants"]}
    limits = [int(cap) for cap in next(iter(variants.values()))["ms"] if cap != "none"]
    return memory_caps.table(variants, limits).replace("no cap", "no limit").split("\n")


def linear(results, gpu):
    """Whole linears, and the cost of a layer's own ranks."""
    lines = linears.table(results(f"linears_{gpu}")["shapes"]).split("\n")
    costs = [line for line in lines if not line.startswith("|")]
    return [*without_empty_columns([line for line in lines if line.startswith("|")]), "",
            f"Compared with no branch, {'; '.join(costs)} of a layer's time."]


def lora(results, gpu):
    """What LoRAs cost, for the README: those whose factors are as wide as the layers, without the sizes of the factors."""
    found = results(f"lora_cost_{gpu}")
    return lora_table(found, [name for name in found["change_s"] if "apart" not in name], 4)


def loras(results, gpu):
    """What LoRAs cost."""
    found = results(f"lora_cost_{gpu}")
    return [*lora_table(found, list(found["change_s"]), 6), "",
            f"The 16-bit model, whose LoRAs are merged, takes {found['bf16']:.1f} ms a step in the same run."]


def lora_table(found, names, columns):
    """The first columns of the table of these sets of LoRAs."""
    rows = [["none", f"**{found['none']:.1f}**", "", "", "", ""]]
    for name in names:
        title = LORAS.get(name, f"one of {name}" if name.startswith("rank") else name)
        rows.append([title, f"**{found[name]:.1f}**", f"{found[name] / found['none'] - 1:+.1%}", f"{found['memory_gb'][name]:.3f} GB",
                     f"{found['factors_gb'][name]:.3f} GB", f"{found['change_s'][name] * 1e3:.0f} ms"])
    head = ["LoRAs", "ms a step", "more", "GPU memory", "its factors", "ready after another strength"]
    return table(head[:columns], [row[:columns] for row in rows])


def layers(results):
    """Errors of single layers by recipe: strong outliers at two widths, and mild ones."""
    base = "DeepCompressor default"
    wide, long, mild = (results(name)["results"] for name in ("layer_error_k3072", "layer_error_k12288", "layer_error_k1024_mild"))
    kinds, rows = list(wide[base]["errors"]), []

    def to_base(found, name):
        return f"{layer_error.mean_error(found[name]) / layer_error.mean_error(found[base]) - 1:+.1%}"

    for name in wide:
        title = f"**{name}**" if name == "ours: best" else name
        rows.append([title, *(f"{layer_error.geometric_mean(wide[name]['errors'][kind]):.2%}" for kind in kinds), to_base(wide, name),
                     f"{layer_error.mean_error(wide[name], 'errors_w4a8'):.2%}", to_base(long, name) if name in long else "",
                     f"{layer_error.mean_error(mild[name]):.2%}" if name in mild else "", to_base(mild, name) if name in mild else ""])
    return table(["recipe", *kinds, "mean, to DeepCompressor", "W4A8 mean", "K = 12288, to DeepCompressor", "mild",
                  "mild, to DeepCompressor"], rows)


def picture(results, gpu):
    """PSNR, SSIM and latent errors of pictures by recipe."""
    return pictures.table(results(f"pictures_{gpu}")["results"]).split("\n")


def sources(results, machine):
    """Where the decibels are lost: the error of the path by kind of layer and by block."""
    return picture_sources.table(results(f"picture_sources_{machine}")["results"]).split("\n")


def recipes(results, gpu):
    """The README's choice of the recipes: PSNR in both kinds of activations, and the difference to DeepCompressor's default."""
    found = results(f"pictures_{gpu}")["results"]
    rows = [[title, *(pictures.cell(found, name, bits, "psnr", pictures.BASE) for bits in pictures.BITS),
             pictures.cell(found, name, "w4a4", "gain", pictures.BASE), f"{found[name]['seconds']:.0f} s"]
            for name, title in README_RECIPES.items() if name in found]
    return table(["recipe", "W4A4, dB", "W4A8, dB", "W4A4 to DeepCompressor's default, dB (95 % interval)", "to quantize"], rows)


def quantize(results, gpu):
    """Time and memory of quantizing full-size models, and their stages."""
    found = [entry for entry in results(f"quantize_full_{gpu}")["entries"] if "stages_of_all_blocks" not in entry]
    titles = [QUANTIZED[entry["model"]] for entry in found]
    rows = [[title, f"**{entry['seconds']:.0f} s**", f"{entry['seconds_with_saving']:.0f} s", f"{entry['vram_gb']:g} GB",
             f"{entry['gpu_gb_allocated']:.1f} GB", f"{entry['gpu_gb_of_the_device']:.1f} GB" if "gpu_gb_of_the_device" in entry else "",
             f"{entry['host_gb_above_the_model']:.1f} GB", f"{entry['model_gb']:.1f} GB", f"{entry['file_gb']:.2f} GB"]
            for title, entry in zip(titles, found)]
    names = sorted({name for entry in found for name in entry["stages"]}, key=lambda name: -max(e["stages"].get(name, 0) for e in found))
    stages = [[name, *(f"{entry['stages'][name]:.1f} s" if name in entry["stages"] else "" for entry in found)] for name in names
              if any(entry["stages"].get(name, 0) >= 0.2 for entry in found)]
    return [*table(["model", "time", "with saving", "limit of GPU memory", "its tensors' peak", "the device's peak",
                    "host memory above the model", "in 16 bits", "file"], rows), "", *table(["stage", *titles], stages)]


def several(results, gpu):
    """Quantizing a part of a FLUX.1 dev's blocks, and a step of the whole model, on one and on two GPUs."""
    found = results(f"several_gpus_{gpu}")
    runs = {name: found[f"quantize_{name}"]["lines"][0] for name in ("one", "two")}
    one, two = (runs[name]["seconds_with_saving"] for name in ("one", "two"))
    doubles, singles = found["arguments"]["blocks"]
    same = "the same" if runs["one"]["sha256"] == runs["two"]["sha256"] else "different"
    steps = [[f"{entry['size']} x {entry['size']}", f"{entry['one']['ms']:.1f} ms", f"{entry['several']['ms']:.1f} ms",
              f"{entry['one']['ms'] / entry['several']['ms']:.2f}x", f"{entry['relative_error']:.3f}",
              f"{entry['relative_error_of_other_attention']:.3f}", "the same" if entry["same_bits_again"] else "others"]
             for entry in found["draw"]["lines"]]
    return [*table(["quantization with saving", "1 GPU", "2 GPUs", "ratio", "bytes"],
                   [[f"{doubles} double and {singles} single blocks", f"{one:.1f} s", f"{two:.1f} s", f"{two / one:.2f}", same]]), "",
            *table(["step", "1 GPU", "2 GPUs", "faster", "relative error", "of another attention function", "bits again"], steps)]


def offloaded(results, gpu):
    """A step under Dynamic VRAM while little GPU memory is free, by this pack's layers and by ComfyUI's own."""
    found = results(f"dynamic_vram_{gpu}")["entries"]
    rows = [[f"{entry['pixels']} x {entry['pixels']}", OFFLOADED[entry["variant"]], f"{entry['model_gb']:.1f} GB",
             f"{entry['free_gb']:g} GB" if entry["free_gb"] else "all", f"{entry['resident_gb']:.1f} GB", f"{entry['ms']:.1f}",
             f"{entry['least_ms']:.1f} to {entry['most_ms']:.1f}", "the same" if entry["same_bits"] else "others"] for entry in found]
    return table(["picture", "model", "its size", "free GPU memory", "of the model on the GPU", "ms a step", "from and to", "bits"], rows)


def file(results, machine):
    """Loading and converting files."""
    return files.tables(results(f"files_{machine}")).replace("warm / cold:", "Warm / cold:").split("\n")


def overhead(results, gpu):
    """Microseconds of Python and the driver, by host."""
    hosts = [results(name)["overhead"] for name in results.names(f"overhead_{gpu}")]
    return table(["microseconds", *(f"host {number}" for number in range(1, len(hosts) + 1))],
                 [[name, *(f"{host[name]:.1f}" if name in host else "" for host in hosts)] for name in hosts[0]])


def compilation(results, gpu):
    """Seconds until the kernels of FLUX.1 dev are ready."""
    return table(["kernels of FLUX.1 dev", "time"], [[name, f"{seconds:.2f} s"] for name, seconds in
                                                     results(f"compile_{gpu}")["compile"].items()])


def demo(results):
    """The PSNR of the demo's pictures."""
    found = results("demo_cpu")
    titles = list(found["mean_psnr"])
    rows = [[entry["prompt"], *(f"{entry[title]:.2f}" for title in titles)] for entry in found["psnr"]]
    rows.append(["**mean**", *(f"**{found['mean_psnr'][title]:.2f}**" for title in titles)])
    sizes = {title: f"{size / 1e6:.2f} MB" for title, size in found["file_bytes"].items()}
    rows.append([f"file (bf16: {sizes['bf16']})", *(sizes[title] for title in titles)])
    return table(["PSNR to bf16, dB", *titles], rows)


TABLES = {"summary": summary, "step": step, "steps": steps, "caps": caps, "linears": linear, "lora": lora, "loras": loras, "layers": layers,
          "pictures": picture, "sources": sources,
          "families": families, "family_pictures": family_pictures, "encoders": encoders,
          "recipes": recipes, "quantize": quantize, "several": several, "offloaded": offloaded, "files": file, "overhead": overhead,
          "compile": compilation, "demo": demo}
