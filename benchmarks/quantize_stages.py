"""What quantize_full.py measures during a run: the seconds of each stage, and the peaks of GPU and host memory."""

import functools
import sys
import threading
import time
from contextlib import contextmanager

import torch

LONGEST = 5  # stages that a line of progress names


class Stages:
    """Seconds by stage and kind of block, and the peaks of GPU memory by stage. A stage's time excludes the stages inside it."""

    def __init__(self, kinds):
        """kinds: names of the model's lists of blocks."""
        self.kinds, self.seconds, self.kind = kinds, {}, "rest"
        self.allocated, self.reserved = {}, {}  # {label: bytes}
        self.running = ["everything else"]
        self.last = time.perf_counter()

    def begin(self):
        """Count time and memory from now on. Returns the time."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.last = time.perf_counter()
        return self.last

    def switch(self):
        """Add the time and memory since the last switch to the running stage."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            for peaks, found in ((self.allocated, torch.cuda.max_memory_allocated()), (self.reserved, torch.cuda.max_memory_reserved())):
                peaks[self.running[-1]] = max(peaks.get(self.running[-1], 0), found)
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        key = self.running[-1], self.kind
        self.seconds[key] = self.seconds.get(key, 0.0) + now - self.last
        self.last = now

    @contextmanager
    def stage(self, label):
        self.switch()
        self.running.append(label)
        try:
            yield
        finally:
            self.switch()
            self.running.pop()

    def set_kind(self, name):
        """name: a block's name, or that of a layer in it; "rest" is everything outside the blocks."""
        self.switch()
        self.kind = name.partition(".")[0] if name.partition(".")[0] in self.kinds else "rest"

    def time(self, owner, name, label):
        """Count every call of owner.name as `label`."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def run(*args, **kwargs):
            with self.stage(label):
                return original(*args, **kwargs)

        setattr(owner, name, run)

    def by_label(self, factors=None):
        """{label: seconds}. factors: {kind of block or "rest": by which its seconds are multiplied}, or None."""
        found = {}
        for (label, kind), seconds in list(self.seconds.items()):
            found[label] = found.get(label, 0.0) + seconds * (factors[kind] if factors else 1)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def text(self):
        """The longest stages so far, and the peak of GPU memory, as a line of text."""
        longest = list(self.by_label().items())[:LONGEST]
        peak = f"; GPU memory {max(self.allocated.values()) / 1e9:.1f} GB" if self.allocated else ""
        return ", ".join(f"{label} {seconds:.0f} s" for label, seconds in longest) + peak


def time_stages(stages):
    """Time the parts of the pipeline, and record the kind of the current block."""
    from comfyui_svdquant.quant.checkpoint import native
    from comfyui_svdquant.quant.host import calibrate, checks, quantize, quantize_blocks, resume
    from comfyui_svdquant.quant.quantizer import calibration, gptq, lowrank, pipeline

    for owner, name, label in (
            (checks, "check_weights", "checking the weights"), (quantize, "record_trajectory", "sampling"),
            (resume.Checkpoint, "save", "keeping the progress"),
            (calibrate, "make_room", "unloading the model"), (calibration, "_replay", "replay"),
            (calibration.InputStats, "add", "statistics"), (quantize_blocks, "effective_weight", "a layer's weight to the device"),
            (pipeline, "choose_smoothing", "smoothing"), (pipeline, "alternate", "branch and codes in turn"),
            (pipeline, "find_scales", "scale search"), (gptq, "damped_cholesky", "Cholesky factor"), (gptq, "gptq_round", "GPTQ"),
            (lowrank, "refit", "refit"), (pipeline, "pack_awq", "modulation layers"), (pipeline, "layer_error", "errors"),
            (pipeline, "naive_error", "errors"), (quantize, "_quantized_model", "the quantized model"), (native, "save", "saving")):
        stages.time(owner, name, label)
    replay, layer, on_device = calibration._replay, quantize_blocks.quantize_layer, calibrate.on_device

    def replay_in(diffusion_model, call, memory, blocks, pass_through, group, *states):
        stages.set_kind(blocks[group[-1]][0])
        return replay(diffusion_model, call, memory, blocks, pass_through, group, *states)

    def layer_in(patcher, name, *args):
        stages.set_kind(name)
        return layer(patcher, name, *args)

    @contextmanager
    def timed_on_device(*args):
        context = on_device(*args)
        with stages.stage("a block's weights to the device"):
            context.__enter__()
        with context_exit(context):
            yield

    calibration._replay, quantize_blocks.quantize_layer, calibrate.on_device = replay_in, layer_in, timed_on_device


@contextmanager
def context_exit(entered):
    """A context that exits another context, which is entered already."""
    try:
        yield
    except BaseException:
        if not entered.__exit__(*sys.exc_info()):
            raise
    else:
        entered.__exit__(None, None, None)


class Memory:
    """The largest resident set of this process in each stage, above its size before the run, and the largest use of the GPU, by this
    process or others. Both are sampled 20 times a second.

    peaks: {label: (bytes above the start, of which bytes mapped from files, such as libraries' code)}; device: bytes of GPU memory, with
    those of CUDA itself.
    """

    def __init__(self, stages):
        import psutil

        self.process, self.stages, self.peaks, self.done = psutil.Process(), stages, {}, threading.Event()
        self.device = 0
        self.before = self.now()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def now(self):
        info = self.process.memory_info()
        return info.rss, getattr(info, "shared", 0)  # only Linux reports shared memory

    def look(self):
        above = tuple(now - before for now, before in zip(self.now(), self.before))
        label = self.stages.running[-1]
        self.peaks[label] = max(self.peaks.get(label, (0, 0)), above)
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self.device = max(self.device, total - free)

    def sample(self):
        while not self.done.wait(0.05):
            self.look()

    def stop(self):
        """The largest of the peaks of host memory."""
        self.done.set()
        self.thread.join()
        self.look()
        return max(self.peaks.values())
