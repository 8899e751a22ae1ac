"""The types in the signatures of the pack's ops, from which torch.library infers their schemas."""

import ast
import importlib
from pathlib import Path
from typing import List, Optional, Sequence

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
# Those that PyTorch 2.5 reads and this pack uses. Another one, such as list[Tensor], keeps the pack from being imported there.
ARGUMENTS = (Tensor, Optional[Tensor], Sequence[Tensor], Sequence[Optional[Tensor]], int, Optional[int], Sequence[int], float)
RESULTS = (Tensor, List[Tensor])


def ops():
    """{name of an op: (module, FunctionDef)}, of the whole pack."""
    found = {}
    for path in (*ROOT.glob("cuda/**/*.py"), *ROOT.glob("quant/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("torch.library.custom_op" in ast.unparse(line) for line in node.decorator_list):
                name = ".".join(("comfyui_svdquant", *path.relative_to(ROOT).with_suffix("").parts))
                found[f"{path.stem}.{node.name}"] = name, node
    return found


def test_all_ops_are_found():
    assert len(ops()) >= 9


@pytest.mark.parametrize(("name", "node"), ops().values(), ids=ops())
def test_pytorch_2_5_reads_the_types(name, node):
    module = vars(importlib.import_module(name))
    assert not (node.args.posonlyargs or node.args.kwonlyargs or node.args.vararg or node.args.kwarg)
    unread = [arg.arg for arg in node.args.args if eval(ast.unparse(arg.annotation), module) not in ARGUMENTS]
    assert not unread, f"PyTorch 2.5 can't read the types of {unread}"
    assert eval(ast.unparse(node.returns), module) in RESULTS
