"""The operations class: ComfyUI's own, plus the two packed layers."""

import comfy.ops

from .. import layout
from ..linear import AWQLinear, SVDQuantLinear


class Operations(comfy.ops.manual_cast):
    """Given to ComfyUI as a model's custom_operations. Every 16-bit layer stays ComfyUI's own; the packed ones inherit
    CastWeightBiasOp, which is how its model patcher knows a layer that can run while its weights lie elsewhere."""

    class SVDQuantLinear(SVDQuantLinear, comfy.ops.CastWeightBiasOp):
        comfy_cast_weights = True

        def forward(self, x):
            comfy.ops.run_every_op()  # honours Cancel
            return super().forward(x)

    class AWQLinear(AWQLinear, comfy.ops.CastWeightBiasOp):
        comfy_cast_weights = True

        def forward(self, x):
            comfy.ops.run_every_op()
            return super().forward(x)

    @classmethod
    def packed(cls, spec):
        """A packed layer without memory of its own, for a LayerSpec."""
        return cls.AWQLinear(spec) if spec.format == layout.AWQ else cls.SVDQuantLinear(spec)
