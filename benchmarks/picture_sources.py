"""Where the decibels are lost: the trained small FLUX with a part of it in 4 bits, and the rest exact.

    python benchmarks/picture_sources.py --comfyui ~/ComfyUI
    python benchmarks/picture_sources.py --table FILE                 the Markdown table of a result file

The model is quantized once, by this pack's preset best. Then one kind of layer or one block at a time runs in 4 bits: its weights alone
(16-bit activations), its activations alone (the exact layer plus the error that rounding the activation adds to the quantized one), or
both. Model, sampler, seeds and captions are those of pictures.py; all that is not in 4 bits is computed in float32.

All parts run on the states of the 16-bit pictures, and what is measured is the error of the whole path: the sum over the steps of the
step's length times the error of the velocity, divided by the latents. It is what the finished latents lose, but for the model's reaction
to its own earlier errors. Pictures amplify those by factors that differ so much from caption to caption that hundreds of captions would be
needed to compare parts. The error of a single velocity, in the last columns, would not do either: an activation's rounding errors differ
from step to step and partly cancel along the path, while those of weights add up. The result file is written after every row.
"""

import argparse
import json
import re
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pictures
import torch
from machine import ROOT, description

WHOLE, KINDS, BLOCKS, NOTHING = "everything", "kind of layer", "block", "nothing"
MODES = ("weights", "activations", "both")
BLOCK = re.compile(r"(.*?blocks\.\d+)\.")
STREAM = re.compile(r"(img|txt)_")


def kind_of(name):
    """A layer's kind: its name without the number of its block and the name of its stream."""
    return STREAM.sub("", re.sub(r"_blocks\.\d+\.", " ", name))


def block_of(name):
    """The block of a layer, or "outside" for those in no block."""
    found = BLOCK.match(name)
    return found[1] if found else "outside"


def in_16_bits(weight, bias, x):
    """The layer that was quantized. weight (N, K), bias (N,) or None: float32."""
    return torch.nn.functional.linear(x.float(), weight, bias).to(x.dtype)


def by_mode(mode, layer, dense, exact, x):
    """A packed layer with rounded weights or rounded activations alone. dense, exact: (weight (N, K), bias (N,) or None) for which it
    stands, and of the layer that was quantized."""
    y = torch.nn.functional.linear(x.float(), *dense)
    if mode == "activations":
        p = layer.at(x)
        y = torch.nn.functional.linear(x.float(), *exact) + type(layer).product(layer, x, p, p["bias"]).float() - y
    return y.to(x.dtype)


class Parts:
    """A quantized model of which parts draw in 4 bits, and the rest as the MODEL from which it was made."""

    def __init__(self, studio, quantized_model):
        from comfyui_svdquant.quant.host import weights
        from comfyui_svdquant.quant.layers.linear import SVDQuantLinear

        self.quantized_model, self.device = quantized_model, studio.device
        self.layers = quantized_model.packed_layers()
        self.smoothed = {name for name, layer in self.layers.items() if isinstance(layer, SVDQuantLinear)}
        self.exact = {}
        for name, layer in self.layers.items():
            bias = None if layer.bias is None else weights.effective_weight(studio.patcher, f"{name}.bias", studio.device).float()
            self.exact[name] = weights.effective_weight(studio.patcher, f"{name}.weight", studio.device).float(), bias
        self.dense = {name: self._dense(layer) for name, layer in self.layers.items()}

    def _dense(self, layer):
        """(weight (N, K), bias (N,) or None), float32: those for which a packed layer stands."""
        from comfyui_svdquant.quant.quantizer import pipeline

        bias = None if layer.bias is None else layer.bias.to(self.device, torch.float32)
        if not hasattr(layer, "weight_proj_up"):
            return pipeline.awq_weight({name: parameter.to(self.device) for name, parameter in layer.named_parameters()}), bias
        return layer.dense(self.device), bias if bias is None else bias - layer.gelu_shift_correction(self.device)

    @contextmanager
    def running(self, names, mode):
        """A context in which the layers `names` run in 4 bits as `mode` says, and the others exactly. A layer with another forward leaves
        its GELU to the model, and is computed apart from the layers around it."""
        try:
            for name, layer in self.layers.items():
                if name not in names or mode == "activations" and name not in self.smoothed:
                    layer.forward = partial(in_16_bits, *self.exact[name])
                elif mode != "both":
                    layer.forward = partial(by_mode, mode, layer, self.dense[name], self.exact[name])
            yield
        finally:
            for layer in self.layers.values():
                vars(layer).pop("forward", None)

    def selections(self):
        """{section: {row: [names of layers]}}"""
        by_kind, by_block = {}, {}
        for name in self.layers:
            by_kind.setdefault(kind_of(name), []).append(name)
            by_block.setdefault(block_of(name), []).append(name)
        return {WHOLE: {WHOLE: list(self.layers), NOTHING: []}, KINDS: by_kind, BLOCKS: by_block}


class Path16:
    """The states of the 16-bit model along its pictures, and its velocities there."""

    def __init__(self, studio):
        from comfyui_svdquant.quant.quantizer import calibration

        model = studio.patcher.model.diffusion_model
        with calibration.recorded_calls(model, []) as self.calls, calibration.recorded_outputs(model) as self.velocities:
            latents = studio.draw(studio.patcher)
        self.steps = studio.args.steps
        self.energy = float(latents.square().sum())
        sigmas = [float(args[1].flatten()[0]) for args, _ in self.calls[:self.steps]] + [0.0]
        self.lengths = [before - after for before, after in zip(sigmas, sigmas[1:])]

    def errors(self, model):
        """{"path": relative error of the whole path; "thirds": [that of each third of the steps alone]; "velocity": relative error of a
        velocity, root of the mean square}."""
        moved = {}  # {(first call of a batch, third): the summed error}
        wrong = right = 0.0
        for number, ((args, kwargs), exact) in enumerate(zip(self.calls, self.velocities)):
            step = number % self.steps
            lost = (model(*args, **kwargs) - exact).float()
            wrong, right = wrong + float(lost.square().sum()), right + float(exact.float().square().sum())
            place = number - step, 3 * step // self.steps
            moved[place] = moved.get(place, 0) + self.lengths[step] * lost
        thirds = [self._relative(moved, [third]) for third in range(3)]
        return {"path": self._relative(moved, range(3)), "thirds": thirds, "velocity": (wrong / right) ** 0.5}

    def _relative(self, moved, thirds):
        """The relative error of these thirds of the path."""
        sums = {}
        for (batch, third), lost in moved.items():
            if third in thirds:
                sums[batch] = sums.get(batch, 0) + lost
        return (sum(float(lost.square().sum()) for lost in sums.values()) / self.energy) ** 0.5


def measure(parts, path, act_bits, record, write):
    """Fill record["results"], {section: {row: {mode: Path16.errors}}}, and call write() after each row. act_bits: of the activations."""
    from comfyui_svdquant.quant.layers.preparation import set_act_bits

    model = parts.quantized_model.model.diffusion_model
    set_act_bits(model, act_bits)
    start = time.perf_counter()
    for section, rows in parts.selections().items():
        for row, names in rows.items():
            modes = MODES if parts.smoothed.intersection(names) else MODES[:1]
            found = {"parameters": sum(parts.exact[name][0].numel() for name in names)}
            for mode in modes:
                with parts.running(set(names), mode):
                    found[mode] = path.errors(model)
            record["results"].setdefault(section, {})[row] = found
            write()
            print(f"[{time.perf_counter() - start:5.0f} s] {section}, {row}: "
                  + ", ".join(f"{mode} {found[mode]['path']:.2%}" for mode in modes), flush=True)


def table(found):
    """The results as Markdown. Squares of errors add up where the parts' errors are independent; a share is such a square divided by that
    of everything in 4 bits."""
    whole = found[WHOLE][WHOLE]["both"]["path"] ** 2
    head = ["in 4 bits", "parameters", "weights: path", "activations: path", "both: path", "share", "weights: velocity",
            "activations: velocity"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for rows in found.values():
        total = dict.fromkeys(MODES, 0.0)
        for row, values in rows.items():
            values = {"both": values["weights"]} | values  # W4A16 layers round no activations
            total = {mode: total[mode] + values[mode]["path"] ** 2 if mode in values else total[mode] for mode in MODES}
            paths = [f"{values[mode]['path']:.3%}" if mode in values else "" for mode in MODES]
            velocities = [f"{values[mode]['velocity']:.3%}" if mode in values else "" for mode in MODES[:2]]
            share = f"{values['both']['path'] ** 2 / whole:.0%}"
            lines.append(" | ".join([f"| {row}", f"{values['parameters'] / 1e6:.2f} M", *paths, share, *velocities]) + " |")
        if WHOLE not in rows:
            roots = [f"{total[mode] ** 0.5:.3%}" for mode in MODES]
            lines.append(" | ".join(["| *root of the sum of squares*", "", *roots, f"{total['both'] / whole:.0%}", "", ""]) + " |")
    thirds = " ".join(f"{mode} {', '.join(f'{error:.3%}' for error in found[WHOLE][WHOLE][mode]['thirds'])};" for mode in MODES)
    return "\n".join([*lines, "", f"The path's first, second and last third of the steps alone: {thirds.rstrip(';')}."])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", help="ComfyUI's folder (default: COMFYUI_PATH)")
    parser.add_argument("--model", default=pictures.FLUX1, help="a small model that reads the demo's captions (default: the demo's FLUX)")
    parser.add_argument("--prompts", type=int, default=8, help="pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at a time")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--act-bits", type=int, choices=(4, 8), default=4, help="of the quantized activations")
    parser.add_argument("--calibration-prompts", type=int, default=8)
    parser.add_argument("--calibration-steps", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="the result file; benchmarks/results/picture_sources[_<model>]_<device>.json")
    parser.add_argument("--table", metavar="FILE", help="print a result file's table, and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(Path(args.table).read_text(encoding="utf-8"))["results"]))
        return 0
    args.compute = "float32"  # in bf16 its own rounding errors would hide those of single layers
    pictures.enter_comfy(args.comfyui, args.device)
    return run(args)


@torch.inference_mode()
def run(args):
    """Measure everything and write the result file."""
    import model_recipes
    from comfyui_svdquant.quant.host import quantize
    from comfyui_svdquant.quant.quantizer import presets

    machine = torch.cuda.get_device_name().replace("NVIDIA ", "").split()[0].lower() if args.device == "cuda" else "cpu"
    path = args.out or ROOT / "benchmarks" / "results" / f"picture_sources{pictures.suffix(args.model)}_{machine}.json"
    record = description() | {"arguments": pictures.recorded(args), "results": {}}
    studio = pictures.Studio(args)
    quantized_model, _ = quantize.quantize(studio.patcher, presets.make_recipe("best", args.rank, branch_bits=16), *studio.calibration(
        args.calibration_prompts), args.calibration_steps, 0, model_recipes.Silent())
    with pictures.by_definition():
        measure(Parts(studio, quantized_model), Path16(studio), args.act_bits, record,
                lambda: path.write_text(json.dumps(record), encoding="utf-8"))
    print(table(record["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
