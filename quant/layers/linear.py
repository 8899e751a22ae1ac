"""The packed linear layers. Their parameters are those of layout.py. A forward is one op, and additions for what the op doesn't take."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.modules import module as module_hooks

from ...cuda import dispatch, gated_linear, nvfp4, nvfp4_ops, ops, reference, row_scales
from ...cuda.int4 import GELU_SHIFT
from ...cuda.operands import NO_LORA, LayerOperands
from . import layout
from .kept_memory import kept

SHAPES = 8  # input shapes whose launch plan a layer caches
SHARING = {"cuda"}  # types of devices on which a LoRA branch and its layer share memory; in host memory streaming.py lays it out


class PackedLinear(torch.nn.Module):
    """The base class: it has the parameters of a LayerSpec, under their names in the file.

    The parameters are allocated on `device`; "meta" allocates nothing, until load_state_dict(assign=True) takes the file's own tensors.
    They may be on another device than the input (ComfyUI's offloading): forward copies each to the input's device.

    lora_branch: lora_branch.LoRABranch of the loaded LoRAs, None without any; set by set_lora_branch. It is no part of the parameters.
    gelu_from: first output column to which the layer itself applies GELU; None if there is none. It is set before the first call. While
    a hook or another forward sees the layer's output first, the model applies the GELU instead (activates_from).
    """

    gelu_from = None
    gated = False  # whether the model's forward calls add_gated too; warm_up prepares for it
    takes_lora = False  # whether product() adds LoRAs
    streams = True  # whether a WeightStream may bring the parameters; not those of which a call reads a small part
    bias_function = ()  # the host's patches of the bias, which its own at() applies
    streamed = None  # streaming.StreamedLayer, while a WeightStream brings the offloaded parameters

    def __init__(self, spec, device="meta"):
        torch.nn.Module.__init__(self)  # a class of the host's, with other arguments, may be another base
        self.spec = spec
        self.lora_branch = None
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.register_parameter("bias", None)
        for name, (shape, dtype) in spec.tensors().items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device),
                                                             requires_grad=False))

    def set_lora_branch(self, branch):
        """Take a LoRABranch in place of the one before; None for none."""
        self.lora_branch = branch

    def at(self, x):
        """{name: the parameter on x's device}, a new dict."""
        device = x.device
        for p in self._parameters.values():  # they usually are there, and this check takes a tenth of the time of to()
            if p is not None and p.device != device:
                streamed = None if self.streamed is None else self.streamed.at(self._parameters, x)
                # Nothing makes the CPU wait for a copy that does not block, and it would read the memory before the numbers are there.
                return streamed or {name: None if p is None else p.to(device, non_blocking=device.type != "cpu")
                                    for name, p in self._parameters.items()}
        return dict(self._parameters)

    @property
    def lora_dtype(self):
        """The 16-bit type of a LoRA branch's factors, and of the bias that a gain needs."""
        return self.spec.dtype

    def activates_from(self):
        """gelu_from, or None if a hook or a replaced forward, such as that of ComfyUI's bypass LoRA, works on the layer's output: it
        expects the output of a linear, before the GELU."""
        own = self.__dict__
        return None if own["_forward_hooks"] or "forward" in own and replaced(self) else self.gelu_from

    def forward(self, x):
        p, branch = self.at(x), self.lora_branch
        if branch is None:
            return self.product(x, p, p["bias"], self.activates_from())
        if branch.gain is not None:
            # The part of the bias that corrects the GELU shift belongs to W x, which the gain multiplies; the rest doesn't.
            correction = branch.gelu_shift_correction.to(x.device, self.lora_dtype)
            y = self.product(x, p, correction) * branch.gain.to(x) - correction.to(x)
            return self.added(y if p["bias"] is None else y + p["bias"].to(x), x)
        lora = branch.operands(x, self.lora_dtype) if self.takes_lora else ()
        if lora and not branch.terms:
            return self.product(x, p, p["bias"], self.activates_from(), lora)
        return self.added(self.product(x, p, p["bias"], None, lora), x, with_lora=len(lora) == 0)

    def add_gated(self, x, residual, gate):
        """residual + gate * self(x), (B, L, N), as one op; None if something needs the layer's own output, or if it has no such op.

        residual: (B, L, N) in x.dtype; gate: (B or 1, 1, N).
        """

    def added(self, y, x, with_lora=True):
        """y (..., N) plus what the LoRA branch adds, and then through the layer's GELU; in place. with_lora: as in LoRABranch.add."""
        return reference.activated(self.lora_branch.add(y, x, with_lora), self.activates_from())

    def product(self, x, p, bias, gelu_from=None, lora=()):
        """W x + bias, through GELU from output `gelu_from` on (None: no GELU): x (..., K) -> (..., N), in x's dtype.

        p: {name: parameter on x's device}, as at() returns it; bias: (N,) or None, in place of the layer's own; lora: if takes_lora, a LoRA
        to add before the GELU, as LoRABranch.operands returns it.
        """
        raise NotImplementedError

    def dense(self, device):
        """(N, K) float32 on `device`: the weight that the layer stands for, LoRAs left out."""
        raise NotImplementedError

    def gelu_shift_correction(self, device):
        """(N,) float32 on `device`: the part of the stored bias that corrects the shift of the GELU's output. The rest is the linear's own
        bias."""
        raise NotImplementedError

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.spec.format}, rank={self.spec.rank}"


class BranchedLinear(PackedLinear):
    """Packed codes beside a low-rank branch."""

    def branch(self, device):
        """(proj_down (K, R), proj_up (N, R)) on `device`, in the 16-bit type in which the layer multiplies with them."""
        # Of .data, since views of a parameter whose data ComfyUI exchanged in inference mode can't be taken.
        return layout.branch_of({name: p.data.to(device) for name, p in self._parameters.items() if name.startswith("weight_proj")},
                                self.lora_dtype)

    def dense(self, device):
        down, up = (factor.float() for factor in self.branch(device))
        return self.packed_part(device) + up @ down.t()

    def gelu_shift_correction(self, device):
        return -GELU_SHIFT * self.packed_part(device)[:, self.spec.unsigned_from:].sum(dim=-1)


class RowScale(NamedTuple):
    """A layer's row scale (row_scales.row_scale), and the parameter and its state from which it was computed."""

    value: torch.Tensor
    address: int
    parameter: weakref.ref
    version: int | None  # number of writes to the parameter; None for tensors made in inference mode, whose writes PyTorch doesn't count

    @classmethod
    def of(cls, value, parameter):
        return cls(value, value.data_ptr(), weakref.ref(parameter), version_of(parameter))

    def is_of(self, parameter, changed=False):
        """Whether this is the row scale of `parameter`. changed: also if the parameter was written to since."""
        return self.parameter() is parameter and (changed or self.version == version_of(parameter))


def version_of(tensor):
    """The number of writes to a tensor; None if PyTorch doesn't count them."""
    try:
        return tensor._version
    except RuntimeError:
        return None


class CachedLaunch(NamedTuple):
    """How a layer runs with inputs of one shape, as long as nothing else changes."""

    launch: Callable       # ops.cached_launch's
    gelu_from: int | None  # of the product; other terms of a LoRA branch are added before the layer's GELU
    act_bits: int          # the layer's act_bits when the launch was made
    row_scale: RowScale | None
    lora_branch: weakref.ref | None  # the branch whose LoRAs the launch adds


class SVDQuantLinear(BranchedLinear):
    """W4A4 with a low-rank branch: x (..., K) -> (..., N). One op, with plain LoRAs too.

    act_bits: 4, as SVDQuant is published, with one code more; 8, the same weights with int8 activations; 0, those that the file gives the
    layer (LayerSpec.act_bits), or else the bits with which the device is fastest.
    """

    act_bits = 0
    takes_lora = True

    def __init__(self, spec, device="meta"):
        super().__init__(spec, device)
        self._row_scale = None  # RowScale
        self._launches = {}  # {x's shape, or (x's shape, "gated") for add_gated: CachedLaunch}

    def __getstate__(self):  # a copy makes its own
        return self.__dict__ | {"_row_scale": None, "_launches": {}}

    def add_gated(self, x, residual, gate):
        branch = self._modules.get("lora_branch")
        if not self.alone() or self.gelu_from is not None or branch is not None and (branch.has_gain or branch.has_terms):
            return None
        if dispatch.plain(x) and not self.bias_function and (known := self._launches.get((x.shape, "gated"))) is not None:
            added = gated_linear.addends(x, residual, gate)
            if added is not None and (z := self._launched(x, None, branch, *known, added)) is not None:
                return z
        p = self.at(x)
        return self._computed(x, p, p["bias"], None, () if branch is None else branch.operands(x, self.lora_dtype), residual, gate)

    def alone(self):
        """Whether nobody's hook or forward sees the layer's output."""
        own = self.__dict__
        return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own and replaced(self)
                    or module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)

    def forward(self, x):
        if dispatch.plain(x) and (known := self._launches.get(x.shape)) is not None:
            branch, y = self._modules.get("lora_branch"), None
            if not self.bias_function and (branch is None or not branch.has_gain):
                others = branch is not None and branch.has_terms
                gelu_from = None if self.gelu_from is None or others else self.activates_from()  # few layers have one
                y = self._launched(x, gelu_from, branch, *known)
            if y is not None:
                return self.added(y, x, with_lora=False) if others else y
        return super().forward(x)

    def _launched(self, x, gelu_from, branch, launch, activated_from, act_bits, c, launched_branch, added=()):
        """The layer with the LoRAs of its branch, by a CachedLaunch; None if anything has changed since. added: gated_linear.addends, for
        a gated one."""
        p = self._parameters
        if branch is not (None if launched_branch is None else launched_branch()):
            return None
        weight_scale, proj_down, bias = p["weight_scale"], p["weight_proj_down"], p["bias"]
        if activated_from != gelu_from or act_bits != self.act_bits or c is not None and (
                c.parameter() is not weight_scale or c.version is not None and c.version != weight_scale._version):
            return None
        addresses = (proj_down.data_ptr(), p["weight"].data_ptr(), weight_scale.data_ptr(), p["weight_smooth_factor"].data_ptr(),
                     0 if c is None else c.address, p["weight_proj_up"].data_ptr(), 0 if bias is None else bias.data_ptr())
        scale = p.get("weight_proj_scale")
        of_scale = () if scale is None else (scale.data_ptr(),)
        factors = None if branch is None else branch._buffers  # a module finds attributes of its own kinds slowly
        if factors is None or (up := factors["lora_up"]) is None:
            return launch(x, weight_scale, proj_down, (*addresses, *of_scale), added=added)
        strength = factors["lora_strength"]
        return launch(x, weight_scale, proj_down, (*addresses, up.data_ptr(), strength.data_ptr(), *of_scale), factors["lora_down"],
                      strength, added)

    def bits(self, device):
        """4 or 8: act_bits, or what they stand for on `device`."""
        return self.act_bits or self.spec.act_bits or ops.best_act_bits(device)

    def product(self, x, p, bias, gelu_from=None, lora=()):
        return self._computed(x, p, bias, gelu_from, lora)

    def _computed(self, x, p, bias, gelu_from, lora, residual=None, gate=None):
        """product(), or with a residual and a gate residual + gate * product(). Keeps a CachedLaunch where there can be one."""
        act_bits, gated = self.bits(x.device), residual is not None
        row_scale = self.row_scale(p["weight_scale"]) if act_bits == 8 else None
        args = operands(p, bias, self.spec.unsigned_from, act_bits, row_scale, gelu_from, lora)
        if dispatch.plain(x) and bias is p["bias"] and self._resident(p, lora):
            launch, known = ops.cached_launch(x, args, gated), self._row_scale
            if launch and (row_scale is None or known.value is row_scale):
                if len(self._launches) >= SHAPES:
                    self._launches.clear()
                branch = weakref.ref(self.lora_branch) if self.lora_branch is not None else None
                self._launches[(x.shape, "gated") if gated else x.shape] = CachedLaunch(
                    launch, gelu_from, self.act_bits, None if row_scale is None else known, branch)
        return gated_linear.gated_linear(x, args, residual, gate) if gated else ops.svdquant_linear(x, args)

    def codes(self):
        """[proj_down, proj_up, their scale] of a branch in 8 bits."""
        p = self._parameters
        return [p["weight_proj_down"], p["weight_proj_up"], p["weight_proj_scale"]]

    def _resident(self, p, lora):
        """Whether the tensors of a call are the layer's own, rather than copies of them."""
        branch = self.lora_branch
        return (all(tensor is self._parameters[name] for name, tensor in p.items())
                and (not lora or lora[0] is branch.lora_down and lora[1] is branch.lora_up and lora[2] is branch.lora_strength))

    @property
    def lora_dtype(self):
        return self.weight_scale.dtype  # fp16 where preparation.compute_in has converted a bf16 layer

    def set_lora_branch(self, branch):
        """Take a LoRABranch made for this layer. The first rows of its lora_down get the layer's own proj_down, so that one product
        computes all ranks. While both are on one GPU, weight_proj_down is a view of these rows, and the branch takes only the LoRAs'
        memory; not with a gain, since the kernels then read weight_proj_down itself, which must be contiguous, nor if the layer's own
        branch has 8 bits. Raises ValueError if the branch has other rows for the layer's ranks."""
        if branch is not None and branch.lora_down is not None and branch.own != self.spec.rank:
            raise ValueError(f"The LoRA branch is for a layer of rank {branch.own}; this one has rank {self.spec.rank}.")
        self.lora_branch = branch
        self._share_proj_down()

    def _share_proj_down(self):
        branch, proj_down = self.lora_branch, self._parameters["weight_proj_down"]
        if branch is None or branch.lora_down is None:
            proj_down.data = proj_down.data.contiguous()
            return
        own = branch.lora_down[:branch.own]
        if self.spec.branch_bits == 8:
            with torch.inference_mode():
                own.copy_(self.branch(own.device)[0].t())
            return
        if own.data_ptr() != proj_down.data_ptr():
            with torch.inference_mode():  # elsewhere a branch that was made in inference mode can't be written to
                own.copy_(proj_down.data.t())
        branch.shares = (branch.gain is None and own.device == proj_down.device and own.dtype == proj_down.dtype
                         and own.device.type in SHARING)
        proj_down.data = own.t() if branch.shares else proj_down.data.contiguous()

    def prepare(self, device):
        """Compute the row scales that forwards on `device` need with 8-bit activations, so that a graph of torch.compile has nothing to
        compute but the op."""
        if self.bits(device) == 8:
            self._find_row_scale(self._parameters["weight_scale"].to(device))

    def row_scale(self, weight_scale):
        """The layer's row scale. weight_scale: the parameter, on the device for which the row scale is."""
        known, parameter = self._row_scale, self._parameters["weight_scale"]
        if torch.compiler.is_dynamo_compiling():
            return self._find_row_scale(weight_scale) if known is None else known.value
        if known is None or not known.is_of(parameter) or known.value.device != weight_scale.device:
            return self._find_row_scale(weight_scale)
        return known.value

    @torch.compiler.disable  # the search tries 61 candidates, which would all become part of a traced graph
    def _find_row_scale(self, weight_scale):
        with kept():
            value = row_scales.row_scale(weight_scale)
        self._row_scale = RowScale.of(value, self._parameters["weight_scale"])
        return value

    def _apply(self, fn, recurse=True):
        """Module.to and the like. The row scales depend on the dtype of weight_scale, but not on its device."""
        before = self._parameters["weight_scale"]
        result = super()._apply(fn, recurse)
        if self.lora_branch is not None:
            self._share_proj_down()
        known, parameter = self._row_scale, self._parameters["weight_scale"]
        if known is not None:
            device = known.value.device if parameter.device.type in ("cpu", "meta") else parameter.device
            if parameter.dtype == before.dtype and known.is_of(before, changed=True):
                self._row_scale = RowScale.of(known.value.to(device), parameter)
            else:
                self._find_row_scale(parameter.to(device))
        return result

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self.lora_branch is not None:
            self._share_proj_down()
        if self._row_scale is not None:
            self._find_row_scale(self._parameters["weight_scale"].to(self._row_scale.value.device))

    def packed_part(self, device):
        """(N, K) float32: the packed codes' share of the weight."""
        weight = reference.dequantize_weight(self.weight.to(device), self.weight_scale.to(device))
        return weight / self.weight_smooth_factor.to(device, torch.float32)


def operands(p, bias, unsigned_from, act_bits, row_scale=None, gelu_from=None, lora=()):
    """The LayerOperands of an SVDQuantLinear's parameters `p`, with a LoRA as LoRABranch.operands returns it. A branch in 8 bits stays so:
    the ops expand it."""
    lora = lora or (None, None, None, NO_LORA)  # those of LayerOperands, which PyTorch 2.5's torch.compile can't fill in
    return LayerOperands(p["weight"], p["weight_scale"], p["weight_proj_down"], p["weight_proj_up"], p["weight_smooth_factor"], bias,
                         unsigned_from, act_bits, row_scale, gelu_from, p.get("weight_proj_scale"), *lora)


def untouched(module):
    """Whether a call of the module runs its class's forward alone, without hooks and without a LoRA branch."""
    own = module.__dict__
    return not (own["_forward_pre_hooks"] or own["_forward_hooks"] or replaced(module) or own["_modules"].get("lora_branch") is not None)


def replaced(module):
    """Whether the module has a forward of its own in place of its class's. ComfyUI's bypass LoRA, when it is removed, leaves the class's
    forward as the module's own."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


class NVFP4Linear(BranchedLinear):
    """W4A4 in NVFP4 with a low-rank branch: x (..., K) -> (..., N). This pack reads such layers from others' files, and makes none."""

    def product(self, x, p, bias, gelu_from=None, lora=()):
        y = nvfp4_ops.nvfp4_linear(x, p["weight"], p["weight_scale"], p["weight_scale_2"], p["weight_proj_down"],
                                   p["weight_proj_up"], p["weight_smooth_factor"], bias)
        return reference.activated(y, gelu_from)

    def packed_part(self, device):
        """(N, K) float32: the packed codes' share of the weight."""
        weight = nvfp4.dequantize_weight(*(p.to(device) for p in (self.weight, self.weight_scale, self.weight_scale_2)))
        return weight / self.weight_smooth_factor.to(device, torch.float32)


class AWQLinear(PackedLinear):
    """W4A16, for the modulation layers, whose input has one row per picture: x (..., K) -> (..., N)."""

    def product(self, x, p, bias, gelu_from=None, lora=()):
        return reference.activated(ops.awq_linear(x, p["weight"], p["weight_scale"], p["weight_zeros"], bias), gelu_from)

    def dense(self, device):
        return reference.dequantize_awq(*(p.to(device) for p in (self.weight, self.weight_scale, self.weight_zeros)))

    def gelu_shift_correction(self, device):
        return torch.zeros(self.out_features, device=device)
