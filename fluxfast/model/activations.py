"""The activations that a block saves for its backward pass: one of six policies per block.

    keep           as the ops save them
    gelu_int8      the MLP's pre-activation u in int8, by the op that reads it
    int8           that, and every other activation (h, q, k, v, o) in int8 with a scale per group
    recompute_mlp  u is recomputed from the block's stream; in a single block u and qkv, which are
                   one product
    offload        activations are copied to the host after their last use, and back
    checkpoint     only the block's inputs; backward runs its forward again

keep, recompute_mlp, offload and checkpoint give the same gradients bit for bit; gelu_int8 and int8
round what is saved, never the forward result. An activation is a saved tensor [B, tokens, width] of
the compute dtype; norm statistics, lse, gates and LoRA factors are none, and are kept by all
policies but checkpoint. A storage is handled once, however many ops save it and whichever slice of
it they save.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import fluxfast_kernels as fk
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

POLICIES = ("keep", "gelu_int8", "int8", "recompute_mlp", "offload", "checkpoint")
EXACT = ("keep", "recompute_mlp", "offload", "checkpoint")
GROUP = 128  # values that share a scale: a head of FLUX


class Store(Protocol):
    """Holds a block's activations between forward and backward. One per block and pass."""

    def put(self, flat: Tensor) -> Any:
        """Stores a storage, given as a 1-D tensor of its dtype. Returns a handle."""

    def get(self, handle: Any) -> Tensor:
        """Returns that tensor, valid until the block's backward is over."""
        ...


class Int8Store:
    """Symmetric int8 with one fp32 scale per GROUP consecutive values."""

    def put(self, flat: Tensor) -> tuple:
        group = group_size(flat.numel())
        rows, _ = fk.quantize_rows(flat.view(1, -1, group), "int8")
        return rows.values, rows.scale[..., None], flat.dtype

    def get(self, handle: tuple) -> Tensor:
        quantized, scale, dtype = handle
        out = torch.empty(quantized.shape, dtype=dtype, device=quantized.device)
        return torch.mul(quantized, scale, out=out).view(-1)


def group_size(count: int) -> int:
    """Returns the largest power of two up to GROUP that divides `count`."""
    return min(GROUP, count & -count)


@dataclass
class SavedStorage:
    """A storage that holds `uses` saved tensors. load: returns it as a 1-D tensor."""

    weak: StorageWeakRef  # the storage's identity, not its memory
    load: Callable[[], Tensor]
    uses: int = 0
    left: int = 0
    value: Tensor | None = None

    def take(self) -> Tensor:
        """Returns the content: loaded for the first of its tensors, dropped with the last."""
        value = self.load() if self.value is None else self.value
        self.left = (self.left or self.uses) - 1
        self.value = value if self.left else None
        return value


@dataclass
class SavedActivations:
    """Saves one block's activations in one forward pass, by its policy.

    tokens: the token counts of activations; heads: of attention, whose lse [B, H, T] is none.
    """

    policy: str = "keep"
    store: Store | None = None
    dtype: torch.dtype = torch.bfloat16
    tokens: tuple[int, ...] = ()
    heads: int = 0
    _storages: dict[Hashable, SavedStorage] = field(default_factory=dict)

    @property
    def gelu_bits(self) -> int:
        """The bits in which `fk.gelu_lora_linear` saves u."""
        return 8 if self.policy in ("gelu_int8", "int8") else 16

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Returns the context that the block runs in."""
        if self.store is None and self.policy != "recompute_mlp":
            yield
            return
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._storages.clear()  # the graph alone owns what is saved, and frees it

    def recompute_mlp(self, function: Callable, *inputs: Tensor):
        """Returns function(*inputs), whose results are not saved under the policy of that name."""
        outputs = function(*inputs)
        if self.policy != "recompute_mlp" or not torch.is_grad_enabled():
            return outputs
        inputs = tuple(x.detach() for x in inputs)
        storages: list[weakref.ref[SavedStorage]] = []  # gone for results that no op has saved

        def recompute(index: int) -> Tensor:
            with torch.no_grad():
                values = _as_tuple(function(*inputs))
            for reference, value in zip(storages, values, strict=True):
                if storage := reference():
                    storage.value = _flat(value)
            return _flat(values[index])

        for index, tensor in enumerate(_as_tuple(outputs)):
            weak = StorageWeakRef(tensor.untyped_storage())
            storage = SavedStorage(weak, partial(recompute, index))
            storages.append(weakref.ref(storage))
            self._storages[weak.cdata] = storage
        return outputs

    def _pack(self, tensor: Tensor) -> Tensor | tuple[SavedStorage, tuple]:
        key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        if storage is None:
            if self.store is None or not self._is_activation(tensor):
                # detached: an op's own result and its graph would keep each other alive
                return tensor.detach()
            handle, get = self.store.put(_flat(tensor)), self.store.get
            weak = StorageWeakRef(tensor.untyped_storage())
            storage = self._storages[key] = SavedStorage(weak, lambda: get(handle))
        storage.uses += 1
        return storage, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def _is_activation(self, tensor: Tensor) -> bool:
        if tensor.ndim != 3 or tensor.dtype != self.dtype or isinstance(tensor, torch.nn.Parameter):
            return False
        _, tokens, width = tensor.shape
        is_lse = tokens == self.heads and width in self.tokens
        # the scales of an int8 u are two wide
        return tokens in self.tokens and tokens > 1 and width > 2 and not is_lse


KEEP = SavedActivations()


def _unpack(packed: Tensor | tuple[SavedStorage, tuple]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    storage, geometry = packed
    return storage.take().as_strided(*geometry)


def _flat(tensor: Tensor) -> Tensor:
    """Returns a tensor's whole storage as a 1-D tensor."""
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return flat.set_(tensor.untyped_storage())


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class BlockRunner:
    """Runs a model's blocks in order, each by its policy, in one forward pass.

    offload: the engine of that policy (`Offload` in `memory/offload.py`), which knows blocks by
    their index.
    """

    def __init__(self, policies: list[str], offload: Any, streams: tuple[Tensor, ...], heads: int):
        self.grad = torch.is_grad_enabled()
        self.policies, self.heads, self.index = policies, heads, 0
        self.dtype = streams[0].dtype
        lengths = [stream.shape[1] for stream in streams]
        self.tokens = (*lengths, sum(lengths))
        self.offload: Any = None
        if self.grad and "offload" in policies:
            if offload is None:
                raise ValueError("a block's policy is offload, and the model has no offload engine")
            self.offload = offload
            offload.begin()

    def __call__(self, block: torch.nn.Module, streams: tuple[Tensor, ...], *inputs):
        """Returns block(*streams, *inputs). streams: the tensors that carry gradients."""
        policy, index = self.policies[self.index] if self.grad else "keep", self.index
        self.index += 1
        if policy == "checkpoint":
            # no generator state to restore: every random number has its own counter
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            outputs = checkpoint(block, *streams, *inputs, **options)
        else:
            store = Int8Store() if policy == "int8" else None
            if policy == "offload":
                store = self.offload.block(index)
                self._report_backward(streams, index)
            saved = SavedActivations(policy, store, self.dtype, self.tokens, self.heads)
            with saved.hooks():
                outputs = block(*streams, *inputs, saved)
        if self.offload:
            self.offload.block_forward_done(index)
        return outputs

    def _report_backward(self, streams: tuple[Tensor, ...], index: int) -> None:
        """Tells the engine when the gradients of all the block's inputs have been launched."""
        # torch's register_multi_grad_hook would keep the graph alive in a reference cycle
        watched = [stream for stream in streams if stream.requires_grad]
        left, offload = len(watched), self.offload

        def launched(_: Tensor) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                offload.block_backward_done(index)

        for stream in watched:
            stream.register_hook(launched)

    def done(self) -> None:
        """Tells the engine that all blocks have run; backward comes next."""
        if self.offload:
            self.offload.forward_done()
