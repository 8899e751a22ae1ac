"""Train a small FLUX.2, Qwen-Image or Z-Image on the demo's pictures, for benchmarks/pictures.py --model:

    python benchmarks/train_families.py --family qwen-image --comfyui ~/ComfyUI --out ~/tiny

It runs as demo/tiny_flux/train.py trains the demo's FLUX: on the same pictures and captions, with the demo's VAE, optimizer, schedule and
number of seconds, from a fixed seed. It writes tiny_FAMILY.safetensors, under the names that ComfyUI reads and with outlier channels, and
training-FAMILY.json with the loss curve. For a CUDA GPU with 40 GB: by estimate, two cores need days for the steps of six minutes on an
H100.
"""

import argparse
import os
import sys
import time

import pictures
import tiny_families
import torch
from machine import ROOT

IN_PLACE = "double_blocks", "single_blocks"  # lists whose blocks add to their streams in place


def trained(args, tiny, vae, source, report):
    """(model, its Family) after the training."""
    from tiny_flux import train

    start = time.perf_counter()
    latents, captions = train.encode_pool(vae, source, args)
    pool_seconds = time.perf_counter() - start
    torch.manual_seed(args.seed)
    model, family = tiny_families.new_model(tiny, args.device)
    tiny_families.initialize(model)
    for name, block in family.running_blocks(model):
        if name.startswith(IN_PLACE):
            train.copy_streams(block)
        if args.compile:
            block.compile()
    steps = train.optimize(model, tiny_families.as_flux(tiny, model), latents, captions, args)
    report |= steps | {"family": family.title, "pool": args.pool, "pool_seconds": round(pool_seconds, 1),
                       "parameters": sum(map(torch.numel, model.parameters()))}
    return model, family


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=tuple(tiny_families.TRAINED), required=True)
    parser.add_argument("--comfyui", help="ComfyUI's folder (default: COMFYUI_PATH)")
    parser.add_argument("--out", default=".", help="folder for the files")
    parser.add_argument("--seconds-flow", type=float, default=345)
    parser.add_argument("--steps-flow", type=int, help="instead of --seconds-flow")
    parser.add_argument("--batch-flow", type=int, default=384)
    parser.add_argument("--lr-flow", type=float, default=1.2e-3)
    parser.add_argument("--pool", type=int, default=102400, help="training pictures, drawn and encoded once")
    parser.add_argument("--measure", type=int, default=256, help="pictures of one of eight batches to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures.enter_comfy(args.comfyui, args.device)
    from tiny_flux import outliers, train

    torch.set_float32_matmul_precision("high")
    tiny, report = tiny_families.TRAINED[args.family], {}
    source = train.picture_source(args.device, args.compile)
    vae = train.load_vae(str(ROOT / "demo" / "tiny_flux" / "tiny_vae.safetensors"), args.device)
    model, family = trained(args, tiny, vae, source, report)
    report |= train.measure_flux(tiny_families.as_flux(tiny, model), vae, source, args)
    report["outliers"] = {"share": outliers.SHARE, "strengths": outliers.STRENGTHS, "seed": args.seed}
    state = {family.stored_name(name): tensor for name, tensor in model.state_dict().items()}
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, f"tiny_{args.family}.safetensors")
    train.save_weights(tiny_families.add_outliers(tiny, state, args.seed), path, train.machine() | report)
    train.save_report({"flow": report}, args, args.family)
    print(f"{path}: {report['steps']} steps, validation loss {report['validation_loss']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
