"""CUDA graphs without a GPU: what stands in for CUDA's recorder.

It writes down the operations that a capture runs, with the tensors that they ran on, and replays
them into the same memory, where all recordings lay out their activations over each other's. What a
graph gets wrong it gets wrong too.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Writes down every operation below autograd, and undoes at its end what they changed."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.made: dict[int, Tensor] = {}  # by address: memory that is the graph's own
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        addresses = {_address(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in self._written(func, args, kwargs):
            if _address(tensor) not in self.made:
                self._before.setdefault(_address(tensor), (tensor, tensor.clone()))
        results = func(*args, **kwargs)
        for tensor in _tensors(results):
            if _address(tensor) not in addresses:
                self.made[_address(tensor)] = tensor
        self.calls.append((func, args, kwargs, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, before in self._before.values():
                tensor.copy_(before)

    @staticmethod
    def _written(func, args, kwargs) -> list[Tensor]:
        named = zip(func._schema.arguments, args, strict=False)
        pairs = [*named, *((a, kwargs.get(a.name)) for a in func._schema.arguments)]
        return _tensors([v for a, v in pairs if a.alias_info is not None and a.alias_info.is_write])


class Replay:
    def __init__(self, tape: Tape, output: Tensor, pool: list[Tape]):
        self.tape, self.output, self.pool = tape, output, pool

    @torch.no_grad()
    def replay(self) -> None:
        for tape in self.pool:
            for tensor in tape.made.values():
                tensor.untyped_storage().fill_(255)  # NaN as a float, whichever
        for func, args, kwargs, results in self.tape.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(results), _tensors(again), strict=True):
                if _address(old) != _address(new):
                    old.copy_(new)


class ReplayRecorder:
    """What CudaRecorder is to a GPU, and a log of what was asked of it."""

    def __init__(self):
        self.pool: list[Tape] = []
        self.log: list[str] = []

    def warm_up(self, run):
        self.log.append("warm up")
        run()
        run()

    def record(self, run, left):
        self.log.append("record")
        with Tape() as tape:
            output = run()
        self.pool.append(tape)
        return Replay(tape, output, self.pool)

    def release(self):
        self.log.append("release")
        self.pool.clear()
