"""Fused forwards of blocks against ComfyUI's own, on the CPU, where block_ops runs its reference."""

import copy
import functools
import inspect
import pickle

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.lumina.model
import comfy.ldm.qwen_image.model
import comfy.ops
import pytest
import torch
from comfyui_svdquant.quant.families import qwen_blocks, z_image_blocks
from comfyui_svdquant.quant.families.flux_blocks import BLOCKS
from comfyui_svdquant.quant.host import fused_blocks

CLASSES = comfy.ldm.flux.layers.DoubleStreamBlock, comfy.ldm.flux.layers.SingleStreamBlock
QWEN = comfy.ldm.qwen_image.model.QwenImageTransformerBlock
Z_IMAGE = comfy.ldm.lumina.model.JointTransformerBlock
ALL_CLASSES = *CLASSES, QWEN, Z_IMAGE
FLUX = "flux_blocks", {"hidden_size": 256, "num_heads": 2, "mlp_ratio": 4.0, "qkv_bias": True, "modulation": True}
OTHERS = {  # {class: (module of its fused forward, arguments)}
    QWEN: ("qwen_blocks", {"dim": 256, "num_attention_heads": 2, "attention_head_dim": 128}),
    Z_IMAGE: ("z_image_blocks", {"layer_id": 0, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "multiple_of": 256, "ffn_dim_multiplier": 4.0,
                                 "norm_eps": 1e-5, "qk_norm": True, "modulation": True, "z_image_modulation": True})}


def host_block(host_class, dtype=torch.float32, device="cpu", **changes):
    _, sizes = OTHERS.get(host_class, FLUX)
    named = inspect.signature(host_class).parameters
    return fused_blocks.new_block(host_class, {name: value for name, value in (sizes | changes).items() if name in named}, dtype, device,
                                  comfy.ops.disable_weight_init)


def block_of(host_class, modulation=True):
    block = host_block(host_class, modulation=modulation)
    block.__class__ = fused_blocks.fused_class(host_class, OTHERS.get(host_class, FLUX)[0])
    return block


@pytest.fixture
def fresh():
    fused_blocks.fused_class.cache_clear()
    yield
    fused_blocks.fused_class.cache_clear()


@pytest.mark.parametrize(("host_class", "modulation", "dtype", "bound"), [
    (host_class, modulation, dtype, bound) for host_class in ALL_CLASSES for modulation in (True, False)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 0.004))
    if host_class not in OTHERS or dtype != torch.float16 and (modulation or host_class is Z_IMAGE)], ids=str)
def test_a_fused_forward_computes_the_hosts(host_class, modulation, dtype, bound):
    """In float32 only the order of sums differs. In 16 bits the host rounds after each pass, the fused forward once."""
    block = block_of(host_class, modulation)
    error = fused_blocks.difference(*fused_blocks.kind(block), dtype, torch.device("cpu"))
    assert error < bound, f"relative error {error:.3g}"


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize(("host_class", "dtype"), [*((c, dtype) for c in CLASSES for dtype in (torch.bfloat16, torch.float16)),
                                                    *((c, torch.bfloat16) for c in OTHERS)], ids=str)
def test_a_fused_forward_is_no_less_accurate(host_class, dtype, device):
    """Against the host's forward in float32, on the same 16-bit weights and inputs."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    angles = torch.rand(1, 1, 128, 64, generator=generator) * 6
    pe = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1).unflatten(-1, (2, 2))
    if host_class is QWEN:
        arguments = {"encoder_hidden_states": random(1, 32, 256), "hidden_states": random(1, 96, 256), "temb": random(1, 256),
                     "image_rotary_emb": pe.to(dtype), "encoder_hidden_states_mask": None}
    elif host_class is Z_IMAGE:
        arguments = {"x": random(1, 128, 256), "x_mask": None, "freqs_cis": pe.transpose(1, 2), "adaln_input": random(1, 256)}
    else:
        states = {"img": random(1, 96, 256), "txt": random(1, 32, 256)} if host_class is CLASSES[0] else {"x": random(1, 128, 256)}
        arguments = states | {"vec": random(1, 256), "pe": pe}
    exact, block = host_block(host_class, torch.float32, device), host_block(host_class, dtype, device)
    with torch.no_grad():
        for mine, other in zip(block.parameters(), exact.parameters()):
            mine.copy_(random(*mine.shape) / (mine.shape[-1] ** 0.5 if mine.ndim > 1 else 4))
            other.copy_(mine)
        arguments = {name: value if value is None else value.to(device) for name, value in arguments.items()}
        inputs = {name: value if value is None else value.float() for name, value in arguments.items()}
        wanted = exact(**copy.deepcopy(inputs))
        plain = block(**copy.deepcopy(arguments))
        block.__class__ = type(block_of(host_class))
        fused = block.declared.forward(block, block.host._replace(takes=lambda *_: True), **arguments)
    wanted, plain, fused = (y if isinstance(y, tuple) else (y,) for y in (wanted, plain, fused))
    for state, x, a, b in zip(wanted, inputs.values(), plain, fused):
        errors = [((y.float() - state).norm() / (state - x).norm()).item() for y in (a, b)]
        assert 0 < errors[1] < errors[0], f"relative error {errors[1]:.4f} fused, {errors[0]:.4f} by ComfyUI's forward"


@pytest.mark.parametrize("host_class", ALL_CLASSES, ids=lambda c: c.__name__)
def test_the_host_is_one_whose_source_was_read(host_class):
    fused = (BLOCKS | qwen_blocks.BLOCKS | z_image_blocks.BLOCKS)[f"{host_class.__module__}.{host_class.__qualname__}"]
    assert fused_blocks.digest(host_class, fused.functions) in fused.sources


def test_a_block_keeps_its_class_for_others():
    block = block_of(CLASSES[1])
    assert isinstance(block, CLASSES[1]) and type(block).__name__ == CLASSES[1].__name__


def test_another_source_runs_the_hosts_forward(fresh, caplog):
    class SingleStreamBlock(CLASSES[1]):
        def forward(self, x, vec, pe, attn_mask=None, modulation_dims=None, transformer_options=None):
            return super().forward(x, vec, pe, attn_mask, modulation_dims, transformer_options) + 1

    SingleStreamBlock.__module__, SingleStreamBlock.__qualname__ = CLASSES[1].__module__, CLASSES[1].__qualname__
    SingleStreamBlock.forward.__module__ = CLASSES[1].__module__
    declared = BLOCKS["comfy.ldm.flux.layers.SingleStreamBlock"]
    same, other = ("a = 1  # one", "b"), ("a = 2", "b")
    assert fused_blocks.digest_of(same) == fused_blocks.digest_of(("a  =  1", "b")) != fused_blocks.digest_of(other)
    comfy.ldm.flux.layers.SingleStreamBlock = SingleStreamBlock
    try:
        assert fused_blocks.digest(SingleStreamBlock, declared.functions) not in declared.sources
        assert fused_blocks.fused_class(SingleStreamBlock, "flux_blocks") is None
    finally:
        comfy.ldm.flux.layers.SingleStreamBlock = CLASSES[1]
    assert "not one that SVDQuant has a fused forward for" in caplog.text


@pytest.mark.parametrize("wrapped", (True, False))
def test_anothers_forward_on_the_class_is_no_known_source(fresh, caplog, monkeypatch, wrapped):
    """inspect.getsource looks through a wrapper, and finds the source that is known."""
    forward = CLASSES[1].forward

    def other(*args, **kwargs):
        return 2 * forward(*args, **kwargs)

    monkeypatch.setattr(CLASSES[1], "forward", functools.wraps(forward)(other) if wrapped else other)
    assert fused_blocks.fused_class(CLASSES[1], "flux_blocks") is None
    assert "Another node pack has replaced parts of ComfyUI's comfy.ldm.flux.layers.SingleStreamBlock" in caplog.text


@pytest.mark.parametrize(("host_class", "replaced"), [
    *((CLASSES[1], name) for name in ("forward", "attention", "apply_mod", "apply_rope", "QKNorm.forward")),
    *((QWEN, name) for name in ("forward", "_modulate", "apply_rope1", "Attention.forward")),
    *((Z_IMAGE, name) for name in ("forward", "lumina.apply_rope", "JointAttention.forward", "modulate"))])
def test_a_function_that_somebody_replaced_later(host_class, replaced, monkeypatch):
    block = block_of(host_class)
    assert block.host_is_known()
    layers, math, qwen, lumina = comfy.ldm.flux.layers, comfy.ldm.flux.math, comfy.ldm.qwen_image.model, comfy.ldm.lumina.model
    owner = {"forward": host_class, "_modulate": host_class, "apply_rope": math, "QKNorm.forward": layers.QKNorm, "apply_rope1": qwen,
             "Attention.forward": qwen.Attention, "lumina.apply_rope": lumina, "JointAttention.forward": lumina.JointAttention,
             "modulate": lumina}.get(replaced, layers)
    monkeypatch.setattr(owner, replaced.rpartition(".")[2], lambda *args, **kwargs: None)
    assert not block.host_is_known()


def test_a_forward_that_differs_runs_the_hosts(monkeypatch, caplog):
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    monkeypatch.setattr(fused_blocks.block_ops, "takes", lambda dtype, device: True)
    sizes = type(block_of(CLASSES[0])), 256, 2, True, torch.float32, torch.device("cpu")
    assert fused_blocks.agrees(*sizes)
    fused_blocks._verdicts.clear()
    monkeypatch.setattr(fused_blocks.block_ops, "gated_residual", lambda x, y, gate: x + 1.1 * gate * y)
    assert not fused_blocks.agrees(*sizes)
    assert "differs from ComfyUI's" in caplog.text
    fused_blocks._verdicts.clear()
    monkeypatch.setattr(fused_blocks.block_ops, "gated_residual", lambda x, y, gate: 1 / 0)
    assert not fused_blocks.agrees(*sizes)
    assert "failed its test on cpu (ZeroDivisionError: division by zero): ComfyUI's own runs" in caplog.text


@pytest.mark.parametrize("host_class", ALL_CLASSES, ids=lambda c: c.__name__)
def test_custom_nodes_read_the_hosts_signature_and_source(host_class):
    block = block_of(host_class)
    assert inspect.signature(block.forward) == inspect.signature(functools.partial(host_class.forward, block))
    assert inspect.getsource(block.forward) == inspect.getsource(host_class.forward)


@pytest.mark.parametrize("host_class", ALL_CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("copied", (copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))),
                         ids=("copy", "deep copy", "pickle"))
def test_a_copy_has_the_fused_forward_and_the_state(host_class, copied):
    block = block_of(host_class)
    other = copied(block)
    assert type(other) is type(block) and fused_blocks.kind(other) == fused_blocks.kind(block)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(block.parameters(), other.parameters(), strict=True))


def test_the_environment_switches_it_off(fresh, monkeypatch):
    monkeypatch.setenv(fused_blocks.VARIABLE, "0")
    assert fused_blocks.fused_class(CLASSES[0], "flux_blocks") is None


def test_each_kind_of_block_is_compared_in_the_background_of_loading(monkeypatch):
    """On the device and in the dtype in which the first forward asks."""
    model, device = torch.nn.ModuleList([block_of(CLASSES[0]), block_of(CLASSES[1]), block_of(CLASSES[1])]), torch.device("cuda", 0)
    assert fused_blocks.preparations(model, torch.bfloat16, torch.device("cpu")) == []
    monkeypatch.setattr(fused_blocks.block_ops, "takes", lambda dtype, device: True)
    monkeypatch.setattr(fused_blocks, "_verdicts", {})
    compared = []
    monkeypatch.setattr(fused_blocks, "_compare", lambda *args: compared.append(args) or True)
    assert all(job() for job in fused_blocks.preparations(model, torch.bfloat16, device, (7,))) and len(compared) == 2
    assert fused_blocks.agrees(*fused_blocks.kind(model[2]), torch.bfloat16, device) and len(compared) == 2
