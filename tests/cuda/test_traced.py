"""Results that torch.compile takes as constants."""

import torch
from comfyui_svdquant.cuda import mlp, ops, traced

CALLS = []


@traced.constant
def factor(device):
    CALLS.append(device)
    return len(CALLS) + 1


def scaled(x):
    return x * factor(x.device)


def test_a_graph_keeps_the_result_and_the_function_stays_what_it_is():
    function, x = factor, torch.ones(3)
    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x) and torch.equal(compiled(x), 2 * x) and len(CALLS) == 1
    assert factor is function and torch.equal(scaled(x), 3 * x)


def test_no_global_has_the_name_that_pytorch_2_5_would_overwrite():
    for module, function in ((ops, ops.best_act_bits), (mlp, mlp.pays)):
        assert function.__code__.co_name not in vars(module)
