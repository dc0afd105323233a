"""A tensor that tells when anything is made beside it in a GPU's memory, where there is no GPU."""

import weakref

import torch
from torch.utils._pytree import tree_map


class OnDevice(torch.Tensor):
    """Stands for a tensor in a GPU's memory: it can be viewed, copied to the CPU and written over,
    nothing else.

    copies: those that are still held, whenever another is made.
    """

    copies: list = []
    held: list[int] = []

    @staticmethod
    def __new__(cls, values):
        kind = {"dtype": values.dtype, "device": "meta", "strides": values.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, **kind)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_to_copy" and kwargs.get("device") == torch.device("cpu"):
            cls.held.append(sum(copy() is not None for copy in cls.copies))
            copy = args[0].values.clone()
            cls.copies.append(weakref.ref(copy.untyped_storage()))
            return copy
        if name == "copy_":
            args[0].values.copy_(args[1])
            return args[0]
        assert name in ("detach", "alias"), f"{name} would make a tensor on the device"
        return tree_map(lambda x: cls(x.values) if isinstance(x, cls) else x, args[0])
