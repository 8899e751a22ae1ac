"""What ComfyUI's allocation graph sees of a step: the tensors that are made in it while it isn't paused."""

import contextlib
import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """rogues() are the allocations that outlive the step: the real graph ends the process for them."""

    def __init__(self):
        super().__init__()
        self.paused, self.pauses, self.made = False, 0, []

    @contextlib.contextmanager
    def pause(self, sync=False):
        self.paused, self.pauses = True, self.pauses + 1
        try:
            yield
        finally:
            self.paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, found = (tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)) for tree in ((args, kwargs), result))
        if not self.paused:
            own = {tensor.untyped_storage()._cdata for tensor in given}
            storages = [tensor.untyped_storage() for tensor in found]
            self.made += [StorageWeakRef(storage) for storage in storages if storage._cdata not in own]
        return result

    def rogues(self):
        gc.collect()
        return [storage for storage in self.made if not storage.expired()]
