"""Text encoders of full size, on the meta device: what of them is packed, and how ComfyUI detects their files."""

import importlib
from types import SimpleNamespace

import comfy.ops
import comfy.sd
import pytest
import torch
from comfyui_svdquant.quant.checkpoint import text_encoder
from comfyui_svdquant.quant.host import clip_loader, clip_modules, clip_saving
from comfyui_svdquant.quant.layers.packed_embedding import EmbeddingSpec

FULL = {"T5_XXL": ("comfy.text_encoders.t5.T5", {"num_layers": 24, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240,
                                                  "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5",
                                                  "vocab_size": 32128}, 4.63),
        "QWEN25_7B": ("comfy.text_encoders.llama.Qwen25_7BVLI", {}, 6.53), "QWEN3_4B": ("comfy.text_encoders.llama.Qwen3_4B", {}, 3.63),
        "MISTRAL3_24B": ("comfy.text_encoders.llama.Mistral3Small24B", {}, 22.2),
        "GEMMA_2_2B": ("comfy.text_encoders.llama.Gemma2_2B", {}, 2.02)}


@pytest.mark.parametrize("te_model", FULL)
def test_at_full_size(te_model):
    """All linears of the text stack are packed, and ComfyUI detects the file by the shapes that the loader gives it."""
    transformer, sizes, billions = FULL[te_model]
    module, _, name = transformer.rpartition(".")
    model = getattr(importlib.import_module(module), name)(dict(sizes), torch.bfloat16, "meta", comfy.ops.manual_cast)
    encoder = clip_modules.encoder("x", model)
    assert encoder.parameters / 1e9 == pytest.approx(billions, rel=0.01) and encoder.misfits == {}
    packed = sum(spec.in_features * spec.out_features for path, spec in encoder.specs.items() if path.startswith(f"{encoder.stack}."))
    assert packed > 0.999 * encoder.parameters and not any("visual" in path for path in encoder.specs)
    assert sum(isinstance(spec, EmbeddingSpec) for spec in encoder.specs.values()) == 1
    size = sum(spec.nbytes() for spec in encoder.specs.values())
    assert size < 0.34 * 2 * sum(spec.in_features * spec.out_features for spec in encoder.specs.values())
    tensors = {key: p for key, p in model.state_dict().items() if key.rpartition(".")[0] not in encoder.specs}
    tensors |= {f"{layer}.{part}": torch.empty(shape, dtype=dtype, device="meta") for layer, spec in encoder.specs.items()
                for part, (shape, dtype) in spec.tensors().items()}
    header = SimpleNamespace(tensors=tensors, read_tensor=tensors.get)
    file = text_encoder.EncoderFile(header, encoder.specs, encoder.kind, clip_saving._is_multimodal(tensors, encoder.specs), {}, "")
    assert comfy.sd.detect_te_model(clip_loader._state(file, {})) == comfy.sd.TEModel[te_model] and not file.multimodal
