"""Draw golden files in a process of its own:  python draw_golden.py FOLDER THREADS FILE...  Prints JSON: the SHA-256 of each latent."""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:] = [str(ROOT / folder) for folder in ("demo", "benchmarks", "tests")] + sys.path[1:]


def main() -> None:
    from machine import load_pack

    from host import launch, setup

    load_pack()
    launch.enter(setup.locate().comfy, "--base-directory", sys.argv[1], "--cpu")
    import torch
    from comfyui_svdquant.quant.host.loader import load_model
    from quant import golden_model
    from quant.comfy_models import prompts, sample

    torch.set_num_threads(int(sys.argv[2]))
    with torch.inference_mode():
        latents = [sample(load_model(path), cond=prompts(1, golden_model.CONTEXT)) for path in sys.argv[3:]]
    print(json.dumps([hashlib.sha256(latent.numpy().tobytes()).hexdigest() for latent in latents]))


if __name__ == "__main__":
    main()
