"""The activations that a block saves for its backward pass: one of six policies per block.

    keep           as the ops save them
    gelu_int8      the MLP's pre-activation u in int8, by the op that reads it
    int8           that, and every other activation (h, q, k, v, o) in int8 with a scale per group
    recompute_mlp  u is computed again in backward from the block's stream; in a single block u and
                   qkv, which are one product
    offload        activations go to the host after their last use and come back
    checkpoint     the block's inputs alone; backward runs its forward again

keep, recompute_mlp, offload and checkpoint give the same gradients bit for bit; gelu_int8 and int8
round what is saved, never the forward result. Norm statistics, lse, gates and LoRA factors are no
activations: they stay as they are under every policy but checkpoint.

An activation is a saved tensor [B, tokens, width] of the compute dtype. It is handled by its whole
storage, once, however many ops save it and whichever slice of it they save.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """Where a block's activations are between forward and backward. One per block and pass."""

    def put(self, flat: Tensor) -> Any:
        """Stores a storage, given as a 1-D tensor of its dtype. Returns a handle."""

    def get(self, handle: Any) -> Tensor:
        """Returns that tensor again, valid until the block's backward is over."""
        ...


class Int8Store:
    """int8, symmetric, one fp32 scale per GROUP values in a row of memory."""

    def put(self, flat: Tensor) -> tuple:
        group = group_size(flat.numel())
        rows, _ = fk.quantize_rows(flat.view(1, -1, group), "int8")
        return rows.values, rows.scale[..., None], flat.dtype

    def get(self, handle: tuple) -> Tensor:
        quantized, scale, dtype = handle
        out = torch.empty(quantized.shape, dtype=dtype, device=quantized.device)
        return torch.mul(quantized, scale, out=out).view(-1)


def group_size(count: int) -> int:
    """Values that share a scale: the largest power of two up to GROUP that divides `count`."""
    return min(GROUP, count & -count)


@dataclass
class SavedStorage:
    """A storage in which `uses` saved tensors lie. load: returns it as a 1-D tensor."""

    weak: StorageWeakRef  # the storage's identity, not its memory
    load: Callable[[], Tensor]
    uses: int = 0
    left: int = 0
    value: Tensor | None = None

    def take(self) -> Tensor:
        """Loads it for the first of its tensors in backward, and drops it with the last."""
        if self.value is None:
            self.value, self.left = self.load(), self.uses
        value, self.left = self.value, self.left - 1
        if self.left == 0:
            self.value = None
        return value


@dataclass
class SavedTensor:
    """A tensor in a saved storage. geometry: shape, stride, offset."""

    storage: SavedStorage
    geometry: tuple

    def load(self) -> Tensor:
        return self.storage.take().as_strided(*self.geometry)


class Recompute:
    """Results of a function that are computed once in backward, for all that ask for them."""

    def __init__(self, function: Callable, inputs: tuple[Tensor, ...]):
        self.function, self.inputs = function, inputs
        self.storages: list[weakref.ref[SavedStorage]] = []  # of the results, in order
        self.values: list[Tensor | None] | None = None

    def take(self, index: int) -> Tensor:
        if self.values is None or self.values[index] is None:
            with torch.no_grad():
                outputs = self.function(*self.inputs)
            # a result that no op saved is dropped: nobody will ask for it
            pairs = zip(_as_tuple(outputs), self.storages, strict=True)
            self.values = [value if storage() is not None else None for value, storage in pairs]
        value, self.values[index] = self.values[index], None
        assert value is not None
        return _flat(value)


@dataclass
class SavedActivations:
    """What one block saves in one forward pass, by its policy.

    tokens: token counts that an activation may have; heads: of attention, whose lse [B, H, T] is no
    activation.
    """

    policy: str = "keep"
    store: Store | None = None
    dtype: torch.dtype = torch.bfloat16
    tokens: tuple[int, ...] = ()
    heads: int = 0
    _storages: dict[Hashable, SavedStorage] = field(default_factory=dict)

    @property
    def gelu_bits(self) -> int:
        """The width in which `fk.gelu_lora_linear` saves u."""
        return 8 if self.policy in ("gelu_int8", "int8") else 16

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """The context that the block runs in."""
        if self.store is None and self.policy != "recompute_mlp":
            yield
            return
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._storages.clear()  # what is saved belongs to the graph alone, and goes with it

    def recompute_mlp(self, function: Callable, *inputs: Tensor):
        """function(*inputs); under the policy of that name its results are not saved."""
        outputs = function(*inputs)
        if self.policy != "recompute_mlp" or not torch.is_grad_enabled():
            return outputs
        recompute = Recompute(function, tuple(x.detach() for x in inputs))
        for index, tensor in enumerate(_as_tuple(outputs)):
            weak = StorageWeakRef(tensor.untyped_storage())
            storage = SavedStorage(weak, lambda index=index: recompute.take(index))
            recompute.storages.append(weakref.ref(storage))
            self._storages[weak.cdata] = storage
        return outputs

    def _pack(self, tensor: Tensor) -> Tensor | SavedTensor:
        key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        if storage is None:
            if self.store is None or not self._is_activation(tensor):
                # not the tensor itself: an op's own result would keep its graph, and be kept by it
                return tensor.detach()
            handle, get = self.store.put(_flat(tensor)), self.store.get
            weak = StorageWeakRef(tensor.untyped_storage())
            storage = self._storages[key] = SavedStorage(weak, lambda: get(handle))
        storage.uses += 1
        return SavedTensor(storage, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def _is_activation(self, tensor: Tensor) -> bool:
        if tensor.ndim != 3 or tensor.dtype != self.dtype or isinstance(tensor, torch.nn.Parameter):
            return False
        _, tokens, width = tensor.shape
        is_lse = tokens == self.heads and width in self.tokens
        # what is two wide are the scales of an int8 u
        return tokens in self.tokens and tokens > 1 and width > 2 and not is_lse


KEEP = SavedActivations()


def _unpack(packed: Tensor | SavedTensor) -> Tensor:
    return packed.load() if isinstance(packed, SavedTensor) else packed


def _flat(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, as 1-D."""
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return flat.set_(tensor.untyped_storage())


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class BlockRunner:
    """Runs a model's blocks, one after the other, each by its policy. One per forward pass.

    offload: the engine of that policy (`Offload` in `memory/offload.py`), which knows blocks by
    their index.
    """

    def __init__(self, policies: list[str], offload: Any, streams: tuple[Tensor, ...], heads: int):
        self.grad = torch.is_grad_enabled()
        self.policies, self.heads, self.index = policies, heads, 0
        self.dtype = streams[0].dtype
        lengths = [stream.shape[1] for stream in streams]
        self.tokens = (*lengths, sum(lengths))
        self.offload: Any = offload if self.grad and "offload" in policies else None
        if self.grad and "offload" in policies and offload is None:
            raise ValueError("a block's policy is offload, and the model has no offload engine")
        if self.offload:
            self.offload.begin()

    def __call__(self, block: torch.nn.Module, streams: tuple[Tensor, ...], *inputs):
        """block(*streams, *inputs, saved). streams: the tensors that carry gradients."""
        policy, index = self.policies[self.index] if self.grad else "keep", self.index
        self.index += 1
        if policy == "checkpoint":
            # there is no generator's state to keep: every random number has its own counter
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
        watched = [stream for stream in streams if stream.requires_grad]
        left, offload = [len(watched)], self.offload

        def launched(_: Tensor) -> None:
            left[0] -= 1
            if left[0] == 0:
                offload.block_backward_done(index)

        for stream in watched:
            stream.register_hook(launched)

    def done(self) -> None:
        """All blocks have run; backward comes next."""
        if self.offload:
            self.offload.forward_done()
