"""Kernels that are broken on purpose: a changed line of a source, seen by the compiler only. For tests on a GPU."""

import contextlib

import pytest
from comfyui_svdquant.cuda import (
    autotune,
    awq,
    compiler,
    gemm_mma,
    gemm_wgmma,
    kernel_loader,
    mlp,
    ops,
    quantize_activation,
    self_test,
    self_test_problems,
)

CACHES = (ops.chosen, ops._launches, mlp._launches, quantize_activation.launcher, gemm_mma.launcher, gemm_wgmma.launcher, awq.launcher,
          awq._prepared, ops.warn_once, compiler.all_sources_digest)
STATE = ((self_test, ("_failed", "_verdicts", "_others", "_locks")), (self_test_problems, ("_problems",)),
         (kernel_loader, ("_kernels", "_locks")))


def forget():
    for cache in CACHES:
        cache.cache_clear()
    ops._warm.clear()
    autotune._pending.clear()
    autotune._spent.clear()


@contextlib.contextmanager
def new_process(folder, *changes):
    """As in a new process whose cache of kernels is `folder`. changes: (file of kernels/, text, its replacement)."""
    def changed(name, text):
        for file, old, new in changes:
            if file == name:
                assert old in text, f"{file} has no {old!r}"
                text = text.replace(old, new)
        return text

    texts = {path.name: changed(path.name, path.read_text(encoding="utf-8")) for path in compiler.SOURCES.glob("*.cu*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiler.CACHE_VARIABLE, str(folder))
        patch.setattr(compiler, "_source_text", texts.get)
        patch.setattr(compiler, "_headers", lambda: {name: text for name, text in sorted(texts.items()) if name.endswith(".cuh")})
        for module, names in STATE:
            for name in names:
                patch.setattr(module, name, {})
        forget()
        yield
    forget()
