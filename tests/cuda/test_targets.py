"""The table of GPUs is consistent, and no other module compares their numbers."""

import ast
import re
from pathlib import Path

import pytest
from comfyui_svdquant.cuda import targets
from comfyui_svdquant.cuda.errors import KernelsUnavailable
from comfyui_svdquant.cuda.targets import TARGETS

ROOT = Path(targets.__file__).parents[1]


@pytest.mark.parametrize(("capability", "arch"), [((7, 5), "sm_75"), ((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"),
                                                  ((12, 1), "sm_121"), ((14, 0), "sm_140")])
def test_the_architecture_of_a_capability(capability, arch):
    assert targets.for_capability(capability).arch == arch


def test_a_gpu_that_is_too_old():
    with pytest.raises(KernelsUnavailable, match=r"compute capability 7\.5 \(RTX 20\) or newer; this one has 7\.0"):
        targets.for_capability((7, 0))


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": KiB of shared memory per SM.
GUIDE = {64: (75,), 100: (86, 89, 120, 121), 164: (80, 87), 228: (90, 100, 103, 110)}


@pytest.mark.parametrize(("per_sm", "number"), [(per_sm, number) for per_sm, numbers in GUIDE.items() for number in numbers])
def test_shared_memory_is_the_guides(per_sm, number):
    assert TARGETS[number].shared_per_sm == per_sm << 10


@pytest.mark.parametrize("number", TARGETS)
def test_a_cta_gets_the_shared_memory_that_the_system_leaves(number):
    """Since Ampere, which has asynchronous copies, the system reserves 1 KiB per CTA."""
    target = TARGETS[number]
    assert target.shared_per_sm - target.shared_per_cta == (1 << 10 if target.async_copies else 0)


def test_rows_are_consistent():
    for number, target in TARGETS.items():
        assert target.number == number and target.shared_per_cta <= target.shared_per_sm
        assert (target.max_cluster > 1) == (target.register_tiles > 0) == target.dependent_launch, "all three came with Hopper"
        assert target.default_act_bits == 8 or target.native_int4
        assert not target.fused_mlp or target.native_int4 and target.async_copies


@pytest.mark.parametrize("capability", [(8, 8), (9, 5), (10, 1), (12, 9), (14, 0)])
def test_an_unknown_gpu_gets_no_more_than_all_have(capability):
    target = targets.for_capability(capability)
    older = TARGETS[max(number for number in TARGETS if number < target.number)]
    assert target.number == 10 * capability[0] + capability[1] and target.arch == f"sm_{target.number}"
    assert (target.shared_per_sm, target.shared_per_cta, target.default_act_bits, target.wgmma) == (100 << 10, 99 << 10, 8, False)
    assert target.native_int4 is older.native_int4 and target.max_cluster == min(older.max_cluster, 8)


@pytest.mark.parametrize(("arch", "numbers", "expected"), [
    ("sm_121", (120, 121), "sm_121"), ("sm_121", (100, 120), "sm_120"), ("sm_90a", (80, 90), "sm_90a"), ("sm_89", (75, 80, 86), "sm_86"),
    ("sm_120", (80, 89, 90, 121), None)])
def test_the_nearest_architecture_that_a_compiler_knows(arch, numbers, expected):
    assert targets.compiled_arch(arch, numbers) == expected


def uses(path):
    """The lines of a module that compare with a compute capability, name an architecture, or ask a GPU for its capability."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            compared = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and type(part.value) is int}
            found = compared & TARGETS.keys()
        else:
            found = (isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"sm_\d+[af]?", node.value)
                     or isinstance(node, ast.Attribute) and node.attr == "get_device_capability")
        if found:
            yield node.lineno


def test_no_other_module_knows_architectures():
    assert list(uses(ROOT / "cuda" / "targets.py"))
    modules = [path for folder in ("cuda", "quant", "nodes") for path in (ROOT / folder).rglob("*.py") if path.name != "targets.py"]
    assert not {str(path.relative_to(ROOT)): lines for path in modules if (lines := list(uses(path)))}
