"""One prompt through text encoders of full size, in 16 bits, in scaled fp8 and in 4 bits:

    python benchmarks/text_encoder.py --comfyui ~/ComfyUI                                  # all encoders, 256 tokens
    python benchmarks/text_encoder.py --comfyui ~/ComfyUI --encoders t5xxl --tokens 77 512

The weights are random; the encoders are ComfyUI's own classes, which compute in float32 from weights in any type. A variant is

    16-bit           bf16 weights, cast to float32 for each product, as ComfyUI does
    fp8-scaled       e4m3fn with one scale a weight, the embedding in bf16, as ComfyUI runs the files that are called so
    ours             this pack's layers
    ours-kernel      the same, by the W4A16 kernel for any number of rows (token_linear.KERNEL_ROWS)
    ours-dequantize  the same, by dequantized weights for any number of rows

The cosine and the relative error are those of the last hidden state to that of 16-bit. Random weights say what rounding does to a layer,
and not what it does to an image. Each entry is merged into the result file as soon as it is measured.
"""

import argparse
import gc
import importlib
import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from machine import description, load_pack, result_path, timed

VARIANTS = "16-bit", "fp8-scaled", "ours", "ours-kernel", "ours-dequantize"
RUNS = 9
FP8_MAX = 448
EVERY = 1 << 30  # rows


class Encoder(NamedTuple):
    """transformer: the dotted name of its class; config: what its constructor gets; words: of its vocabulary that prompts use."""

    transformer: str
    config: dict
    words: int


T5 = {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64, "num_layers": 24, "dense_act_fn": "gelu_pytorch_tanh",
      "is_gated_act": True, "model_type": "t5", "vocab_size": 32128}
LLAMA = "comfy.text_encoders.llama."
ENCODERS = {"t5xxl": Encoder("comfy.text_encoders.t5.T5", T5, 32000), "qwen25-7b": Encoder(f"{LLAMA}Qwen25_7BVLI", {}, 150000),
            "qwen3-4b": Encoder(f"{LLAMA}Qwen3_4B", {}, 150000), "mistral-24b": Encoder(f"{LLAMA}Mistral3Small24B", {}, 130000),
            "gemma2-2b": Encoder(f"{LLAMA}Gemma2_2B", {}, 250000)}
SMALL_LLAMA = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
               "vocab_size": 500}
SMALL_T5 = T5 | {"d_ff": 320, "d_model": 128, "num_heads": 2, "num_layers": 2, "vocab_size": 500}
SMALL = {"t5xxl": Encoder("comfy.text_encoders.t5.T5", SMALL_T5, 500),
         "qwen3-4b": Encoder(f"{LLAMA}Qwen3_4B", SMALL_LLAMA, 500), "gemma2-2b": Encoder(f"{LLAMA}Gemma2_2B", SMALL_LLAMA, 500)}


class Fp8Linear(torch.nn.Module):
    """x (..., K) float32 -> (..., N): e4m3fn weights, cast to x's type, and one scale."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().max().float() / FP8_MAX
        self.weight = torch.nn.Parameter((linear.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x)
        return torch.nn.functional.linear(x * self.scale, self.weight.to(x.dtype), bias)


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_encoder(encoder):
    """A transformer with the same random bf16 weights each time."""
    import comfy.ops

    module, _, name = encoder.transformer.rpartition(".")
    made = getattr(importlib.import_module(module), name)(dict(encoder.config), torch.bfloat16, device(), comfy.ops.manual_cast)
    g = torch.Generator(device()).manual_seed(0)
    for path, p in made.named_parameters():
        p.requires_grad = False
        if p.ndim < 2:
            p.data.fill_(0.0 if path.endswith("bias") or "Gemma" in name else 1.0)
        else:  # T5 doesn't divide its attention's logits by the root of a head's width: its trained queries are small
            scale = p[0].numel() ** -0.5 * (1 / 8 if path.endswith("SelfAttention.q.weight") else 1)
            p.data.normal_(generator=g).mul_(1 if made.get_input_embeddings().weight is p else scale)
    return made


def converted(made, variant):
    """(the encoder as a variant, seconds that its layers took)."""
    from comfyui_svdquant.quant.host import clip_modules
    from comfyui_svdquant.quant.quantizer.text_encoder import pack

    start = time.perf_counter()
    if variant != "16-bit":
        specs = clip_modules.encoder("", made).specs
        for path, spec in specs.items():
            module = made.get_submodule(path)
            if variant == "fp8-scaled":
                if clip_modules.is_linear(module):
                    clip_modules.swap(made, path, Fp8Linear(module))
                continue
            layer = clip_modules.packed(spec, module)
            layer.load_state_dict(pack(module.weight, module.bias if clip_modules.is_linear(module) else None, spec)[0], assign=True)
            clip_modules.swap(made, path, layer)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return made, time.perf_counter() - start


def measure(encoder, variant, tokens, exact):
    """The entries of one variant, one for each number of tokens. exact: {tokens: hidden state in 16 bits}, which the first one fills."""
    from comfyui_svdquant.quant.layers import token_linear

    made, seconds = converted(new_encoder(encoder), variant)
    gc.collect()
    megabytes = sum(t.nbytes for t in (*made.parameters(), *made.buffers())) / 1e6
    rows, entries = token_linear.KERNEL_ROWS, []
    token_linear.KERNEL_ROWS = {"ours-kernel": EVERY, "ours-dequantize": 0}.get(variant, rows)
    try:
        for count in tokens:
            ids = torch.randint(3, encoder.words, (1, count), generator=torch.Generator().manual_seed(1)).to(device())
            timed(lambda ids=ids: made(ids, None, dtype=torch.float32), 3)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            times, found = timed(lambda ids=ids: made(ids, None, dtype=torch.float32)[0], RUNS)
            found = found.double().flatten()
            reference = exact.setdefault(count, found)
            peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0
            entries.append({"tokens": count, "ms": round(sorted(times)[RUNS // 2], 3), "least_ms": round(min(times), 3),
                            "megabytes": round(megabytes, 1), "peak_megabytes": round(peak, 1), "seconds_to_pack": round(seconds, 2),
                            "cosine": round(float(torch.nn.functional.cosine_similarity(found, reference, dim=0)), 6),
                            "relative_error": round(float((found - reference).norm() / reference.norm()), 5)})
    finally:
        token_linear.KERNEL_ROWS = rows
    return entries


def add(path, gpu, entries):
    """Put entries into the result file, in place of those of the same encoder, variant and number of tokens."""
    path = Path(path)
    known = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    same = ("encoder", "variant", "tokens")
    new = [[entry[key] for key in same] for entry in entries]
    kept = [entry for entry in known if [entry[key] for key in same] not in new]
    path.write_text(json.dumps({"device": gpu, "entries": kept + entries}, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, help="ComfyUI's folder")
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[77, 256, 512])
    parser.add_argument("--small", action="store_true", help="encoders of two layers, to try the benchmark")
    parser.add_argument("--out", help="the result file; benchmarks/results/text_encoder_<gpu>.json")
    args = parser.parse_args()
    from host import launch

    launch.enter(args.comfyui, *([] if torch.cuda.is_available() else ["--cpu"]))
    load_pack()
    import comfyui_version

    run = description()
    gpu = run.pop("device")
    run |= {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"), "comfyui": comfyui_version.__version__}
    encoders = SMALL if args.small else ENCODERS
    for name in (name for name in args.encoders if name in encoders):
        exact = {}
        for variant in dict.fromkeys(["16-bit", *args.variants]):  # the others are compared with it
            try:
                with torch.inference_mode():
                    found = measure(encoders[name], variant, args.tokens, exact)
            except torch.cuda.OutOfMemoryError:
                print(f"{name} {variant}: out of memory", flush=True)
                continue
            entries = [{"encoder": name, "variant": variant} | run | entry for entry in found]
            add(args.out or result_path("text_encoder", gpu), gpu, entries)
            for entry in entries:
                print(" | ".join(f"{entry[key]}" for key in ("encoder", "variant", "tokens", "ms", "megabytes", "seconds_to_pack", "cosine",
                                                             "relative_error")), flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
