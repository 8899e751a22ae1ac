"""Draw with 4-bit MODELs in a ComfyUI that was started with certain options:  python draw_with_flags.py FOLDER [OPTION...]

FOLDER holds flux.safetensors and flux_4bit.safetensors of a random FLUX.1. The script writes draws.safetensors there, with the latents of
four MODELs: `plain` and `loaded` come from these two files, `quantized` is made from the first in this process, and `reloaded` comes from
the file of `quantized`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:] = [str(ROOT / folder) for folder in ("demo", "benchmarks", "tests")] + sys.path[1:]


def main() -> None:
    from host import launch, setup

    folder, options = Path(sys.argv[1]), sys.argv[2:]
    launch.enter_as_main(setup.locate().comfy, "--base-directory", str(folder), *options)
    import torch
    from machine import load_pack

    load_pack()
    from comfyui_svdquant.quant.host.loader import load_model
    from quant.comfy_models import quantized, sample, save
    from safetensors.torch import save_file

    with torch.inference_mode():
        plain, loaded = (load_model(str(folder / f"{name}.safetensors")) for name in ("flux", "flux_4bit"))
        # Under Dynamic VRAM, which is a GPU's, calibration is what makes ComfyUI move the 16-bit model.
        made = quantized(plain, "fast" if torch.cuda.is_available() else "naive")[0]
        reloaded = load_model(save(made, folder / "made.safetensors", overwrite=True))
        models = {"plain": plain, "loaded": loaded, "quantized": made, "reloaded": reloaded}
        save_file({name: sample(model).double().contiguous() for name, model in models.items()}, folder / "draws.safetensors")


if __name__ == "__main__":
    main()
