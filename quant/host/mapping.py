"""The file whose bytes are a model's parameters, until they move to a device.

The system reads a mapped file when its pages are used. If the file has been cut off by then, the process ends with SIGBUS, which no handler
can turn into an exception; if it has been written to, the weights have changed in silence. So the file is compared with the one that was
loaded before ComfyUI uses the weights: before each load, once a sampling run. Only a copy in memory protects the rest of the run. ComfyUI
makes one with --disable-mmap. A file that is deleted or replaced under its name stays as it was for those who map it.
"""

import comfy.utils

from ..checkpoint.header import CheckpointError


class Mapping:
    """The mapped file of a model. header: of the file; tensors: those that were mapped."""

    def __init__(self, header, tensors):
        self.header = header
        self.addresses = frozenset() if comfy.utils.DISABLE_MMAP else frozenset(tensor.data_ptr() for tensor in tensors if tensor.numel())

    def check(self, parameters):
        """Raise CheckpointError if the file has been written to while one of the parameters still lies in it."""
        if not self.addresses or not self.header.written_to():
            return
        if any(parameter.data_ptr() in self.addresses for parameter in parameters):
            raise CheckpointError(f"{self.header.file} was written to after it was loaded, and this MODEL still has its weights in it; run "
                                  "SVDQuant Load Model again, and start ComfyUI with --disable-mmap if files change while they are in use.")
        self.addresses = frozenset()  # all parameters have moved away, and other tensors may get these addresses


def check(model):
    """Mapping.check of a BaseModel; a model that comes from no mapped file passes."""
    if mapping := getattr(model, "svdquant_mapping", None):
        mapping.check(model.diffusion_model.parameters())
