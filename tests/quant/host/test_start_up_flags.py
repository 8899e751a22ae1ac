"""4-bit MODELs in a ComfyUI started with options for types, attention or memory. Each set of options has its own process."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import comfy.cli_args
import pytest
import torch
from comfyui_svdquant.quant.quantizer.metrics import relative_error
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("draw_with_flags.py")
ON_CPU = not torch.cuda.is_available()

# Compatible sets of options. Storage types and memory options change nothing in a model that computes in float32, as on the CPU;
# attention options change its order of rounding.
SAME = """
--fp8_e4m3fn-unet --supports-fp8-compute
--bf16-unet --reserve-vram 1 --async-offload 2 --force-non-blocking --disable-smart-memory --disable-pinned-memory --mmap-torch-files
    --disable-dynamic-vram --force-channels-last --vram-headroom 1
--fp16-unet --force-fp16 --disable-async-offload --disable-mmap --enable-dynamic-vram --disable-nvml-pressure --disable-cuda-graphs
    --deterministic
"""
NEARLY = """
--fp32-unet --force-fp32 --use-split-cross-attention --force-upcast-attention
"""
# The same, of options that fewer people use: drawn with SVDQUANT_HEAVY_TESTS.
SELDOM_SAME = """
--fp8_e5m2-unet --fast
--fp8_e8m0fnu-unet --fast-disk --high-ram
"""
SELDOM_NEARLY = """
--use-quad-cross-attention --disable-xformers
--fp64-unet
--fp16-intermediates --use-pytorch-cross-attention --dont-upcast-attention
"""
ON_GPU = """
--gpu-only
--highvram
--normalvram
--lowvram
--novram
--disable-cuda-malloc
--disable-dynamic-vram
"""

# Options with which no test can draw here, and options without effect on a diffusion model.
UNDRAWN = """
    --use-sage-attention --use-flash-attention --use-ck-attention --directml --oneapi-device-selector --disable-ipex-optimize
    --enable-triton-backend --disable-triton-backend --cuda-malloc
    --help --listen --port --tls-keyfile --tls-certfile --enable-cors-header --max-upload-size --base-directory --models-directory
    --extra-model-paths-config --output-directory --temp-directory --input-directory --user-directory --auto-launch --disable-auto-launch
    --cuda-device --default-device --cpu --fp16-vae --fp32-vae --bf16-vae --cpu-vae --fp8_e4m3fn-text-enc --fp8_e5m2-text-enc
    --fp16-text-enc --fp32-text-enc --bf16-text-enc --preview-method --preview-size --cache-classic --cache-lru --cache-none --cache-ram
    --enable-manager --disable-manager-ui --enable-manager-legacy-ui --default-hashing-function --debug-hang --dont-print-server
    --quick-test-for-ci --windows-standalone-build --disable-metadata --disable-all-custom-nodes --whitelist-custom-nodes
    --disable-api-nodes --multi-user --verbose --log-stdout --front-end-version --front-end-root --enable-compress-response-body
    --comfy-api-base --database-url --enable-assets --disable-assets-autoscan --enable-asset-hashing --feature-flag --list-feature-flags
    """

KNOWN = {option for action in comfy.cli_args.parser._actions for option in action.option_strings if option.startswith("--")}


def sets(lines, allowed, *marks):
    """pytest parameters for each set of options that this ComfyUI has: (options, allowed relative change)."""
    for line in lines.replace("\n    ", " ").split("\n"):
        kept, keep = [], True
        for word in line.split():
            keep = word in KNOWN if word.startswith("--") else keep  # a value goes with its option
            kept += [word] if keep else []
        if kept:
            yield pytest.param(tuple(kept), allowed, id=" ".join(kept), marks=marks)


def test_every_option_of_this_comfyui_is_drawn_with_or_named():
    named = {word for words in (SAME, NEARLY, SELDOM_SAME, SELDOM_NEARLY, ON_GPU, UNDRAWN) for word in words.split()}
    assert sorted(KNOWN - named) == []


@pytest.fixture(scope="module")
def draw(pair_files, tmp_path_factory):
    """A function: options -> {MODEL: latent} from draw_with_flags.py."""
    folder = tmp_path_factory.mktemp("flags")
    for name, path in zip(("flux", "flux_4bit"), pair_files):
        (folder / f"{name}.safetensors").hardlink_to(path)

    @cache
    def drawn(*options):
        command = [sys.executable, str(SCRIPT), str(folder), *(["--cpu"] if ON_CPU else []), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if "--fp64-unet" in options and "No backend can handle 'apply_rope'" in done.stderr:
            pytest.skip("this ComfyUI's own positional encoding takes no float64: no FLUX draws with --fp64-unet")
        assert done.returncode == 0, done.stderr[-2000:]
        return load_file(folder / "draws.safetensors")

    return drawn


@pytest.mark.parametrize(("options", "allowed"), [
    *sets(SAME, 0), *sets(NEARLY, 0.01), *sets(SELDOM_SAME, 0, pytest.mark.heavy), *sets(SELDOM_NEARLY, 0.01, pytest.mark.heavy),
    *sets(ON_GPU, 0, pytest.mark.gpu)])
def test_4_bit_models_draw_the_same_as_without_options(draw, options, allowed):
    expected, found = draw(), draw(*options)
    if not ON_CPU:  # the options may change the device's compute dtype
        allowed += 2 * relative_error(found["plain"], expected["plain"])
    assert relative_error(found["loaded"], expected["loaded"]) <= allowed
    assert torch.equal(found["quantized"], found["reloaded"])


@pytest.mark.parametrize(("options", "allowed"), [*sets("--disable-dynamic-vram", 0, pytest.mark.gpu)])
def test_quantize_makes_the_same_of_a_model_under_dynamic_vram(draw, options, allowed):
    """A ComfyUI that has Dynamic VRAM uses it unless told not to, and its patcher moves the 16-bit MODEL during calibration."""
    dynamic, classic = draw(), draw(*options)
    for name in ("quantized", "loaded"):
        assert relative_error(dynamic[name], classic[name]) <= allowed, name
