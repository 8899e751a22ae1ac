"""The command line of quantize.py. The settings have the names, values and defaults of SVDQuant Quantize Model and Save Model."""

import argparse
from pathlib import Path

from ..checkpoint import formats
from ..layers import layout
from ..quantizer import presets
from ..quantizer.calibration import TOKENS_PER_INPUT

DESCRIPTION = """Quantize a model to 4 bits without a graph and a server, with the pipeline of SVDQuant Quantize Model.

One GPU:       python quantize.py IN OUT --prompts FILE --text-encoder FILE FILE
Several GPUs:  torchrun --nproc-per-node 2 quantize.py IN OUT ...        writes the same file sooner
A list:        python quantize.py --jobs jobs.json                       one job on each GPU, until all are done

Arguments after -- go to ComfyUI, such as -- --lowvram. An interrupted run goes on where it stopped when the same command runs again."""


def new_parser():
    parser = argparse.ArgumentParser(prog="quantize.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", nargs="?", help="the model in bf16, fp16 or fp8: a .safetensors file")
    parser.add_argument("target", metavar="OUT", nargs="?", help="the .safetensors file to write")
    parser.add_argument("--lora", metavar=("FILE", "STRENGTH"), nargs="+", action="append", default=[],
                        help="a LoRA to bake in, and its strength, 1 if left out; may be repeated")
    _add_recipe(parser.add_argument_group("as in SVDQuant Quantize Model"))
    _add_calibration(parser.add_argument_group("calibration, for the presets best, slow and fast"))
    run = parser.add_argument_group("the run")
    run.add_argument("--comfyui", metavar="FOLDER", help="ComfyUI's folder; default: COMFYUI_PATH, or the one that this pack is in")
    run.add_argument("--progress", metavar="FOLDER", default="output",
                     help="where finished blocks are stored, so that an interrupted run resumes: a folder, output or temp (ComfyUI's), off")
    run.add_argument("--layout", choices=list(formats.WRITERS), default="native", help="the file's layout")
    run.add_argument("--overwrite", action="store_true", help="replace OUT if it is a quantized model")
    run.add_argument("--report", metavar="FILE", help="also write the report: as JSON if the name ends in .json, otherwise as text")
    run.add_argument("--jobs", metavar="FILE", help="a JSON list of jobs, each an object with IN and OUT as `in` and `out`, and options "
                                                    "under their names without dashes; options of the command line hold for all")
    run.add_argument("--ray", nargs="?", const="auto", metavar="ADDRESS", help="run the jobs on a Ray cluster")
    return parser


def _add_recipe(group):
    group.add_argument("--preset", choices=list(presets.PRESETS), default="best")
    group.add_argument("--rank", type=int, default=presets.DEFAULT_RANK, metavar="N",
                       help=f"{presets.MIN_RANK} to {presets.MAX_RANK} in steps of {presets.RANK_STEP}")
    group.add_argument("--branch-bits", type=int, choices=layout.BRANCH_BITS, default=presets.DEFAULT_BRANCH_BITS,
                       help="bits of the low-rank branch: in 8, twice the rank takes about as much memory as in 16")
    group.add_argument("--exceptions", default="", metavar="TEXT",
                       help="layer patterns, separated by commas: `pattern` keeps its layers in 16 bits, `pattern = rank` sets their "
                            "rank, `pattern = int8` gives them activations of 8 bits")
    group.add_argument("--tokens", type=int, default=TOKENS_PER_INPUT, metavar="N", help="calibration tokens per input of a layer")
    group.add_argument("--steps", type=int, default=8, metavar="N", help="sampling steps for each prompt")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise for calibration")


def _add_calibration(group):
    group.add_argument("--prompts", metavar="FILE", help="a text file with a prompt on each line")
    group.add_argument("--text-encoder", metavar="FILE", nargs="+", default=[], help="the model's text encoders, in safetensors format")
    group.add_argument("--conditioning", metavar="FILE", help="encoded prompts, in place of the two above")
    group.add_argument("--write-conditioning", metavar="FILE", help="write the encoded prompts to a file, and quantize nothing")
    group.add_argument("--guidance", type=float, metavar="X", help="as FluxGuidance sets it")
    group.add_argument("--size", default="1024", metavar="WxH", help="of the pictures in pixels: 1024, or 1216x832")


def parsed(arguments, parser=None):
    """The options as a Namespace; --lora as [(path, strength)], --size as (width, height). Ends the program with a message if they can't
    start a run."""
    parser = parser or new_parser()
    options = parser.parse_args(arguments)
    if options.jobs:
        return options
    if not options.source or not (options.target or options.write_conditioning):
        parser.error("name the model to quantize and the file to write: quantize.py IN OUT")
    if options.conditioning and (options.prompts or options.text_encoder):
        parser.error("--conditioning takes the place of --prompts and --text-encoder; give one or the other")
    if bool(options.prompts) != bool(options.text_encoder):
        parser.error("--prompts and --text-encoder go together")
    if options.write_conditioning and not options.prompts:
        parser.error("--write-conditioning needs --prompts and --text-encoder")
    try:
        options.lora = [(entry[0], float(entry[1]) if len(entry) > 1 else 1.0) for entry in options.lora]
        if any(len(entry) > 2 for entry in options.lora):
            raise ValueError
    except ValueError:
        parser.error("--lora takes a file and a number, such as --lora style.safetensors 0.8")
    options.size = _size(options.size, parser)
    calibrated = bool(options.prompts or options.conditioning)
    if not options.write_conditioning and presets.PRESETS[options.preset]["smooth"] == "search" and not calibrated:
        parser.error(f"the preset {options.preset} calibrates on pictures that the model samples: give --prompts and --text-encoder, or "
                     "--conditioning, or choose --preset data-free")
    if options.steps < 1 or options.tokens < 1 or not 0 <= options.seed < 2**64:
        parser.error("--steps and --tokens are at least 1, and --seed is at least 0")
    try:
        presets.make_recipe(options.preset, options.rank, options.exceptions)
    except ValueError as error:
        parser.error(str(error))
    for name in ("source", "target", "prompts", "conditioning", "write_conditioning", "report"):
        if getattr(options, name):
            setattr(options, name, str(Path(getattr(options, name)).resolve()))
    return options


def _size(text, parser):
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 64 for side in sides):
        parser.error(f"--size {text} is no size in pixels; write 1024, or 1216x832")
    return int(sides[0]), int(sides[-1])
