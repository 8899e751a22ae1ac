"""The doctor's checks of the kernels: the choice, the self-test, the autotune, and the speed."""

import os
import time

import torch

from ...cuda import autotune, gemm_mma, gemm_wgmma, linear_speed, quantize_activation, self_test
from ...cuda.choose import Layer, choose
from .. import families
from .part import SLOW, Part, first_line

RANK = 32  # the rank of a layer that is not joined
BENCHMARK_SECONDS = 45  # no measurement starts later; with the last one the benchmark takes at most a minute


def layers(target):
    """{description: choose.Layer} of the largest layers of published models, as they run on a GPU of a Target."""
    found = {}
    for family in families.FAMILIES:
        for name, m, k, n in family.largest:
            layer = family.layer(name)
            gelu_from = layer.gelu and layer.gelu.columns_from(k, n)
            found[f"{name} ({m}, {k}, {n})"] = Layer(m, n, k, layer.branches * RANK, layer.unsigned_from(k, n), target.default_act_bits,
                                                      target.dtypes[0], gelu_from)
    return found


def _mode(layer):
    return f"W4A{layer.act_bits}"


def _chosen(layer, machine):
    return choose(layer, machine.target, machine.sms, self_test.failed(machine.device))


def kernels(machine, blocked=False):
    """The kernels that are chosen for the largest layers. blocked: whether a problem keeps them from running."""
    lines = [f"not in use until the problems above are solved; {SLOW}"] if blocked else []
    lines.append("for the largest layers (tokens, inputs, outputs), where activations is auto")
    lines += [f"{name} {_mode(layer)}: {_described(_chosen(layer, machine))}" for name, layer in layers(machine.target).items()]
    return Part(tuple(lines))


def _described(found):
    """The kernels of a LinearKernels, or None, as text."""
    if found is None:
        return "PyTorch"
    quantizes = quantize_activation.source(found.plans[0])
    if found.wgmma:
        rows, tokens, split = found.tile
        return f"{quantizes}, {gemm_wgmma.SOURCE} {rows} x {tokens}{', K shared by two' if split > 1 else ''}"
    return f"{quantizes}, {gemm_mma.SOURCE} {found.tile.rows} x {found.tile.tokens}, {found.storage.name}"


def verdicts(machine):
    """The self-test's verdicts on these kernels, as far as they are known."""
    if os.environ.get(self_test.VARIABLE) == "0":
        return Part((f"switched off by {self_test.VARIABLE}=0",))
    found = {}
    for layer in layers(machine.target).values():
        if (chosen := _chosen(layer, machine)) is not None:
            for source, passed in self_test.recorded(chosen, layer, machine.device).items():
                found.setdefault(source, []).append(passed)
    lines = [f"{source}: {_counted(passed)}" for source, passed in found.items()]
    wrong = sorted({source for source, passed in found.items() if False in passed}
                   | {kind.source for kind in self_test.failed(machine.device)})
    return Part(tuple(lines), tuple(f"{source} gave a wrong result in its self-test on this GPU, and another kernel or PyTorch takes its "
                                    "place; please report this page to the authors of the SVDQuant nodes." for source in wrong))


def _counted(passed):
    words = {True: "passed", False: "WRONG", None: "not tested yet (the first load of a model tests them)"}
    return ", ".join(f"{passed.count(verdict)} {word}" for verdict, word in words.items() if verdict in passed)


def autotuned(machine):
    """Whether the kernel choices are measured on this GPU."""
    if not autotune.wanted(machine.target):
        return Part((f"switched off by {autotune.VARIABLE}=0" if os.environ.get(autotune.VARIABLE) == "0" else
                     "not needed, since the choices were measured on this generation",))
    found = []
    for layer in layers(machine.target).values():
        if (chosen := _chosen(layer, machine)) is not None:
            found.append(autotune.is_measured(chosen, layer, machine.target, machine.device))
    total = len(found) - found.count(None)
    return Part((f"on: {found.count(True)} of these {total} layers are measured; the first load of a model measures the others",))


# --- Speed ------------------------------------------------------------------------------------------------------------


def benchmark(machine, now=time.monotonic):
    """TFLOP/s of the largest layers in 16 bits, in fp8 and by the kernels, as many as fit into BENCHMARK_SECONDS."""
    begin, lines = now(), ["TFLOP/s of a whole layer (tokens, inputs, outputs), the activation's quantization included"]
    with torch.inference_mode():
        for name, layer in layers(machine.target).items():
            half = "bf16" if layer.dtype == torch.bfloat16 else "fp16"
            ways = {half: linear_speed.sixteen_bits, "fp8": linear_speed.fp8, _mode(layer): linear_speed.by_kernels}
            times = {}
            for way, make in ways.items():
                if now() - begin > BENCHMARK_SECONDS:
                    return Part((*lines, *_row(name, layer, times), "stopped, since the time is over"))
                times[way] = _measured(make, layer, machine.device)
            lines += _row(name, layer, times)
    return Part(tuple(lines))


def _measured(make, layer, device):
    """Seconds of a layer, or why it could not be measured."""
    try:
        return linear_speed.seconds(make(layer, device), device)
    except torch.OutOfMemoryError:
        return "not enough GPU memory"
    except Exception as error:
        return f"not possible ({first_line(error)[:80]})"
    finally:
        torch.cuda.empty_cache()


def _row(name, layer, times):
    """A layer's line of the benchmark; none if `times` is empty."""
    if not times:
        return []
    flop, (base, *_) = 2e-12 * layer.m * layer.k * layer.n, times.values()
    cells = []
    for way, seconds in times.items():
        ratio = f" ({base / seconds:.2f}x)" if cells and not isinstance(base, str) and not isinstance(seconds, str) else ""
        cells.append(f"{way} {seconds}" if isinstance(seconds, str) else f"{way} {flop / seconds:.0f}{ratio}")
    return [f"{name}: {', '.join(cells)}"]
