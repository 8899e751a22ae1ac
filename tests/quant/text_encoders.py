"""Small random text encoders of each kind in a real ComfyUI, with its own tokenizers.

ComfyUI detects an encoder by the sizes of its tensors, and takes all other sizes from its own configurations. `small` replaces the numbers
in both: fewer and narrower layers, the same classes, forwards and tokenizers. test_text_encoders.py has the detection at full size.
"""

import base64
import contextlib
import functools
import importlib
import io
import json
from dataclasses import dataclass

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.qwen_vl as qwen_vl
import comfy.text_encoders.sd3_clip as sd3_clip
import sentencepiece
import torch
from safetensors.torch import save_file

LLAMA = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
CLIP = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 49408,
        "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407}
WORDS = "a small red fox and a big blue bird sit on the old green wall of a white house near the river in the evening sun".split()


VISION = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_layers": 1}


def spiece():
    """A sentencepiece model, in the bytes that ComfyUI reads from an encoder's file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([" ".join(WORDS)] * 20), model_writer=model, vocab_size=64,
                                             hard_vocab_limit=False, bos_id=2, eos_id=1, pad_id=0, unk_id=3, minloglevel=2)
    return torch.tensor(list(model.getvalue()), dtype=torch.uint8)


def tekken():
    """Mistral's tokenizer with single bytes as its words."""
    special = [{"rank": rank, "token_str": text} for rank, text in enumerate(("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))]
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(bytes([rank])).decode()} for rank in range(256)]
    text = json.dumps({"config": {"pattern": "[^ ]+| ", "default_vocab_size": 256 + len(special),
                                 "default_num_special_tokens": len(special)}, "special_tokens": special, "vocab": vocab})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@dataclass(eq=False)
class Kind:
    """An encoder: the dotted name of its transformer's class; its TEModel and the CLIPType of a CLIP of it alone; sizes that replace those
    of ComfyUI's configuration; functions that make the tokenizer's entries of its file; name: of its SDClipModel."""

    name: str
    transformer: str
    te_model: str
    clip_type: str
    sizes: dict
    tokenizer: dict

    @functools.cached_property
    def shapes(self):
        """{name: shape} of the transformer's tensors."""
        module, _, name = self.transformer.rpartition(".")
        with torch.device("meta"):
            model = getattr(importlib.import_module(module), name)(dict(self.sizes), torch.float16, "meta", comfy.ops.manual_cast)
        return {key: tuple(p.shape) for key, p in model.state_dict().items()}

    @functools.cached_property
    def mark(self):
        """Those of `shapes` by which an encoder of this kind is recognized."""
        return {key: shape for key, shape in self.shapes.items() if key.endswith("weight") and "visual" not in key}

    def tensors(self, seed=0):
        """{name: random tensor} of a file in 16 bits."""
        g = torch.Generator().manual_seed(seed)
        found = {key: _random(key, shape, g).to(torch.float16) for key, shape in self.shapes.items()}
        return found | {key: make() for key, make in self.tokenizer.items()}


def _random(key, shape, g):
    if len(shape) == 1:
        return 0.02 * torch.randn(shape, generator=g) + (0.0 if key.endswith("bias") else 1.0)
    if len(shape) == 2 and shape[0] > 20 * shape[1]:  # the table of embeddings
        return torch.randn(shape, generator=g)
    # T5 doesn't divide its attention's logits by the root of a head's width: its trained queries are small.
    weight = torch.randn(shape, generator=g) * shape[1] ** -0.5 * (1 / 8 if key.endswith("SelfAttention.q.weight") else 1)
    return weight * (0.5 + torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g))  # rows differ, as in trained models


T5 = {"d_ff": 320, "d_kv": 64, "d_model": 128, "num_heads": 2, "num_layers": 2, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
      "model_type": "t5", "vocab_size": 32128}
KINDS = {
    "t5xxl": Kind("t5xxl", "comfy.text_encoders.t5.T5", "T5_XXL", "SD3", T5, {}),
    "clip_l": Kind("clip_l", "comfy.clip_model.CLIPTextModel", "CLIP_L", "STABLE_DIFFUSION", CLIP, {}),
    "clip_g": Kind("clip_g", "comfy.clip_model.CLIPTextModel", "CLIP_G", "STABLE_DIFFUSION", CLIP | {"hidden_size": 128}, {}),
    "qwen25_7b": Kind("qwen25_7b", "comfy.text_encoders.llama.Qwen25_7BVLI", "QWEN25_7B", "QWEN_IMAGE", LLAMA, {}),
    "qwen3_4b": Kind("qwen3_4b", "comfy.text_encoders.llama.Qwen3_4B", "QWEN3_4B", "LUMINA2", LLAMA, {}),
    "gemma2_2b": Kind("gemma2_2b", "comfy.text_encoders.llama.Gemma2_2B", "GEMMA_2_2B", "LUMINA2", LLAMA | {"vocab_size": 2000},
                      {"spiece_model": spiece}),
}
if hasattr(comfy.sd.TEModel, "QWEN3_8B"):  # newer ComfyUI; the tokenizer of 0.3.75's Mistral needs an older transformers than it asks for
    KINDS["mistral"] = Kind("mistral3_24b", "comfy.text_encoders.llama.Mistral3Small24B", "MISTRAL3_24B", "FLUX2",
                            LLAMA | {"num_hidden_layers": 31, "intermediate_size": 64, "vocab_size": 2000}, {"tekken_model": tekken})
    KINDS["qwen3_8b"] = Kind("qwen3_8b", "comfy.text_encoders.llama.Qwen3_8B", "QWEN3_8B", "FLUX2", LLAMA | {"num_hidden_layers": 28}, {})


@contextlib.contextmanager
def small(monkeypatch):
    """ComfyUI detects and builds the encoders of KINDS in their small sizes."""
    init = comfy.sd1_clip.SDClipModel.__init__

    @functools.wraps(init)
    def with_sizes(self, *args, **kwargs):
        options, transformer = kwargs.get("model_options", {}), kwargs.get("model_class")
        name = options.get("model_name") or ("" if kwargs.get("textmodel_json_config") is not None else "clip_l")
        kind = next(kind for kind in KINDS.values() if kind.name == name or transformer is not None
                    and kind.transformer == f"{transformer.__module__}.{transformer.__qualname__}")
        init(self, *args, **kwargs | {"model_options": {**options, f"{name}_model_config": dict(kind.sizes)}})

    def detect(state):
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        found = [kind for kind in KINDS.values() if kind.mark.items() <= shapes.items()]
        return comfy.sd.TEModel[max(found, key=lambda kind: len(kind.mark)).te_model] if found else None

    with monkeypatch.context() as patch:
        patch.setattr(comfy.sd1_clip.SDClipModel, "__init__", with_sizes)
        patch.setattr(comfy.sd, "detect_te_model", detect)
        patch.setattr(comfy.sd, "t5xxl_detect", lambda states: next(
            (sd3_clip.t5_xxl_detect(state) for state in states if "encoder.final_layer_norm.weight" in state), {}))
        vision = qwen_vl.Qwen2VLVisionTransformer
        patch.setattr(qwen_vl, "Qwen2VLVisionTransformer", lambda **kwargs: vision(**kwargs | VISION))
        yield


def write(folder, kind, seed=0, **others):
    """The path of a new file of a random encoder. others: {name: tensor} in place of its own."""
    path = folder / f"{kind}_{seed}.safetensors"
    save_file(KINDS[kind].tensors(seed) | others, str(path))
    return str(path)


def load(paths, clip_type):
    """ComfyUI's CLIP of files in 16 bits."""
    return comfy.sd.load_clip(list(paths), [], getattr(comfy.sd.CLIPType, clip_type, comfy.sd.CLIPType.STABLE_DIFFUSION))


def encode(clip, text="a red fox on the old wall"):
    """(conditioning, pooled or None) of a prompt."""
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
