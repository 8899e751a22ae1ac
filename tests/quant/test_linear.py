"""The packed layers apart from any model: where their parameters are looked for, and what a warm-up asks for."""

import torch
from comfyui_svdquant.quant import layout, linear


def test_parameters_that_are_there_are_not_touched():
    module = linear.SVDQuantLinear(layout.LayerSpec(layout.SVDQUANT, 128, 64, 16, 128), "cpu")
    here = module.at(torch.zeros(1, 128))
    assert all(here[name] is p for name, p in module._parameters.items()) and here.keys() == module._parameters.keys()
    here["bias"] = None  # as ComfyUI's patches of an offloaded layer are put in
    assert module.bias is not None
    elsewhere = module.at(torch.zeros(1, 128, device="meta"))
    assert {p.device.type for p in elsewhere.values()} == {"meta"} and list(elsewhere) == list(module._parameters)
    module.weight_scale = torch.nn.Parameter(elsewhere["weight_scale"], requires_grad=False)  # one of them has moved
    assert {p.device.type for p in module.at(torch.zeros(1, 128, device="meta")).values()} == {"meta"}


def test_warm_up_asks_for_every_kind_of_layer_once(monkeypatch):
    asked = []
    monkeypatch.setattr(linear.ops, "warm_up", lambda layers, device: asked.append((list(layers), device)) or [])
    wide, split = (layout.svdquant_spec(k, 64, 16, 128, True, torch.bfloat16) for k in (128, 256))
    awq = layout.LayerSpec(layout.AWQ, 128, 192)
    model = torch.nn.Sequential(*map(linear.SVDQuantLinear, (wide, wide, split)), linear.AWQLinear(awq), torch.nn.Linear(8, 8))
    linear.set_act_bits(model, 8)
    assert linear.warm_up(model, torch.device("cpu")) == [] and asked == []
    linear.warm_up(model, torch.device("cuda", 1), tokens=(70, 5))
    (layers, device), = asked
    assert device == torch.device("cuda", 1)
    assert layers == [(70, 64, 128, 16, 128, 8, torch.bfloat16), (5, 64, 128, 16, 128, 8, torch.bfloat16),
                      (70, 64, 256, 16, 128, 8, torch.bfloat16), (5, 64, 256, 16, 128, 8, torch.bfloat16),
                      (1, 192, 128, 0, 128, None, torch.bfloat16)]
