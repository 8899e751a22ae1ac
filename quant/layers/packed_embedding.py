"""The embedding of a text encoder in 8 bits: row i is code[i] * scale[i].

The tensors and their names are those of ComfyUI's own int8_tensorwise embeddings, V tokens of width D:

    X.weight        (V, D)  int8
    X.weight_scale  (V, 1)  float32
    X.comfy_quant           uint8, JSON: format, orig_dtype, orig_shape
"""

from dataclasses import dataclass

import torch

from .linear import PackedLinear

INT8 = "int8_tensorwise"
# Methods by which classes of the host's read and write their own tables; those of a plain module suit the parameters of a packed one.
OF_TABLES = ("state_dict", "_save_to_state_dict", "_load_from_state_dict", "_apply")


@dataclass(frozen=True)
class EmbeddingSpec:
    """The sizes of an 8-bit embedding, with the attributes of a LayerSpec that the patcher reads: out_features is V, in_features D.

    dtype: the 16-bit type of what the embedding gives where its caller names none.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.bfloat16
    format: str = INT8
    rank: int = 0

    @property
    def unsigned_from(self):
        return self.in_features

    def tensors(self):
        """{parameter name: (shape, dtype)}, in the module as in the file."""
        return {"weight": ((self.out_features, self.in_features), torch.int8), "weight_scale": ((self.out_features, 1), torch.float32)}

    def nbytes(self):
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors().values())

    def conf(self):
        """The JSON object of `X.comfy_quant`."""
        return {"format": self.format, "orig_dtype": str(self.dtype), "orig_shape": [self.out_features, self.in_features]}


class PackedEmbedding(PackedLinear):
    """ids (...,) -> (..., D). It is a packed layer, so that patches of its weight become a LoRA branch. A call reads a few of its rows,
    where they lie, and copies these alone to the device of the ids.

    `of` makes one in place of an embedding of the host's, whose class may have a forward of its own around that of the host's operations,
    such as Gemma's, which scales the rows.

    Code of ComfyUI's that multiplies by the whole table, as text generation with tied weights does, casts `weight` and then calls the
    functions in `weight_function`: the one there turns the codes into the weight that they stand for.
    """

    streams = False

    def __init__(self, spec, device="meta"):
        super().__init__(spec, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = spec.out_features, spec.in_features, None

    @property
    def weight_function(self):
        return [self._decoded]

    @weight_function.setter
    def weight_function(self, functions):
        """ComfyUI's patcher empties the list, and fills it with patches, which are in the LoRA branch here."""

    def _decoded(self, codes):
        return self._patched(codes * self.weight_scale.to(codes), torch.arange(self.num_embeddings, device=codes.device))

    @classmethod
    def of(cls, embedding, spec):
        """A packed embedding on the meta device that does what the host's `embedding` does around its lookup of rows."""
        host = type(embedding)
        own = {"forward": host.forward, **{name: getattr(torch.nn.Module, name) for name in OF_TABLES if hasattr(host, name)}}
        return type(cls.__name__, (cls, host), own)(spec)

    def forward_comfy_cast_weights(self, ids, out_dtype=None):
        """What the forward of ComfyUI's operations calls: the rows, in `out_dtype` or else the spec's."""
        home = ids.to(self.weight.device)
        rows = self.weight[home].to(ids.device).to(torch.float32) * self.weight_scale[home].to(ids.device)
        return self._patched(rows, ids).to(out_dtype or self.spec.dtype)

    def _patched(self, rows, ids):
        """What the LoRA branch makes of rows of the table. rows: (..., D) floating point, which may be changed; ids: (...,), their
        numbers."""
        branch = self.lora_branch
        if branch is None:
            return rows
        if branch.gain is not None:
            rows = rows * branch.gain[ids.to(branch.gain.device)].unsqueeze(-1).to(rows)
        for own, up, down in branch.low_rank_parts(self.num_embeddings):
            rows = rows + (_rows_of(up, own, ids) @ down).to(rows)
        for term in branch.terms:
            rows[..., slice(*term.cols)] += _rows_of(term.dense(), term.rows, ids).to(rows)
        return rows

    def dense(self, device):
        return self.weight.to(device, torch.float32) * self.weight_scale.to(device)

    def gelu_shift_correction(self, device):
        return torch.zeros(self.out_features, device=device)


def _rows_of(matrix, own, ids):
    """(..., columns) float32: rows `ids` of a matrix whose first row is number own[0] and last one own[1] - 1; zeros for others."""
    start, stop = own
    ids = ids.to(matrix.device)
    inside = (ids >= start) & (ids < stop)
    return matrix[(ids - start).clamp(0, stop - start - 1)].float() * inside.unsqueeze(-1)
