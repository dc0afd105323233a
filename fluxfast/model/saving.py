"""How a block keeps what its backward pass needs.

    keep      as the ops save it
    u8        the MLP's pre-activation u in codes of 8 bits, by the op that reads it
    8bit      that, and every other activation (h, q, k, v, o) in int8 codes with a scale per group
    fc1       u is made again from the block's stream in backward; in a single block u and qkv,
              which are one product
    offload   activations go to the host after their last use and come back (see `Keeper`)
    replay    the block's inputs alone; backward runs its forward again

keep, fc1, offload and replay give the same gradients bit for bit; u8 and 8bit round what is saved,
never the forward result. What is no activation (norm statistics, lse, gates, LoRA factors) stays as
it is under every policy but replay.

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

POLICIES = ("keep", "u8", "8bit", "fc1", "offload", "replay")
EXACT = ("keep", "fc1", "offload", "replay")
GROUP = 128  # values that share a scale: a head of FLUX


class Keeper(Protocol):
    """Where a block's activations are between forward and backward. One per block and pass.

    put: a storage as a 1-D tensor of its dtype -> a handle. get: that tensor again, good until the
    block's backward is over.
    """

    def put(self, flat: Tensor) -> Any: ...

    def get(self, handle: Any) -> Tensor: ...


class CodesKeeper:
    """int8 codes, symmetric, one fp32 scale per GROUP values in a row of memory."""

    def put(self, flat: Tensor) -> tuple:
        group = group_size(flat.numel())
        rows, _ = fk.quantize_rows(flat.view(1, -1, group), "int8")
        return rows.codes, rows.scale[..., None], flat.dtype

    def get(self, handle: tuple) -> Tensor:
        codes, scale, dtype = handle
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        return torch.mul(codes, scale, out=out).view(-1)


def group_size(count: int) -> int:
    """Values that share a scale: the largest power of two up to GROUP that divides `count`."""
    return min(GROUP, count & -count)


@dataclass
class _Kept:
    """One storage. make: -> it again as a 1-D tensor; uses: how many saved tensors lie in it."""

    weak: StorageWeakRef  # keeps the storage's identity, not its memory
    make: Callable[[], Tensor]
    uses: int = 0
    left: int = 0
    value: Tensor | None = None

    def take(self) -> Tensor:
        if self.value is None:
            self.value, self.left = self.make(), self.uses
        value, self.left = self.value, self.left - 1
        if self.left == 0:
            self.value = None
        return value


@dataclass
class _Place:
    """A saved tensor: where it lies in its storage."""

    kept: _Kept
    geometry: tuple

    def tensor(self) -> Tensor:
        return self.kept.take().as_strided(*self.geometry)


@dataclass
class Saving:
    """One block's policy during one forward pass. A context manager: the block runs inside.

    tokens: token counts that an activation may have; heads: of attention, whose lse [B, H, T] is no
    activation.
    """

    policy: str = "keep"
    keeper: Keeper | None = None
    dtype: torch.dtype = torch.bfloat16
    tokens: tuple[int, ...] = ()
    heads: int = 0
    _known: dict[Hashable, _Kept] = field(default_factory=dict)

    @property
    def u_bits(self) -> int:
        """What `gelu_lora_linear` is told to save u in."""
        return 8 if self.policy in ("u8", "8bit") else 16

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """What a block runs inside."""
        if self.keeper is None and self.policy != "fc1":
            yield
            return
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._known.clear()  # what is saved belongs to the graph alone, and goes with it

    def remade(self, function: Callable, *inputs: Tensor):
        """function(*inputs); under fc1 its results are not kept for backward but made again."""
        outputs = function(*inputs)
        if self.policy != "fc1" or not torch.is_grad_enabled():
            return outputs
        made = outputs if isinstance(outputs, tuple) else (outputs,)
        again = _Again(function, tuple(x.detach() for x in inputs))
        for index, tensor in enumerate(made):
            storage = tensor.untyped_storage()
            weak = StorageWeakRef(storage)
            kept = _Kept(weak, lambda index=index: again.take(index))
            again.kept.append(weakref.ref(kept))
            self._known[weak.cdata] = kept
        return outputs

    def _pack(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None:
            if self.keeper is None or not self._is_activation(tensor):
                # not the tensor itself: an op's own result would keep its graph, and be kept by it
                return tensor.detach()
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            flat.set_(storage)
            handle, get = self.keeper.put(flat), self.keeper.get
            known = _Kept(StorageWeakRef(storage), lambda: get(handle))
            self._known[storage._cdata] = known
        known.uses += 1
        return _Place(known, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def _is_activation(self, tensor: Tensor) -> bool:
        if tensor.ndim != 3 or tensor.dtype != self.dtype or isinstance(tensor, torch.nn.Parameter):
            return False
        _, tokens, width = tensor.shape
        is_lse = tokens == self.heads and width in self.tokens
        # what is two wide are the scales of u's codes
        return tokens in self.tokens and tokens > 1 and width > 2 and not is_lse


def _unpack(packed) -> Tensor:
    return packed.tensor() if isinstance(packed, _Place) else packed


class _Again:
    """Results of a function that are formed once in backward, for all that ask for them."""

    def __init__(self, function: Callable, inputs: tuple[Tensor, ...]):
        self.function, self.inputs = function, inputs
        self.kept: list[weakref.ref[_Kept]] = []
        self.values: list[Tensor | None] | None = None

    def take(self, index: int) -> Tensor:
        if self.values is None or self.values[index] is None:
            with torch.no_grad():
                made = self.function(*self.inputs)
            made = made if isinstance(made, tuple) else (made,)
            # a result that no op saved is nobody's to wait for
            pairs = zip(made, self.kept, strict=True)
            self.values = [value if kept() is not None else None for value, kept in pairs]
        value, self.values[index] = self.values[index], None
        flat = torch.empty(0, dtype=value.dtype, device=value.device)
        return flat.set_(value.untyped_storage())


KEEP = Saving()


class Offload(Protocol):
    """The engine behind the policy `offload`: see `memory/offload.py`. Blocks by their index."""

    def begin(self) -> None: ...

    def block(self, index: int) -> Keeper: ...

    def block_forward_done(self, index: int) -> None: ...

    def forward_done(self) -> None: ...

    def block_backward_done(self, index: int) -> None: ...


class BlockRunner:
    """Runs a model's blocks, one after the other, each by its policy. One per forward pass."""

    def __init__(
        self, policies: list[str], offload: Offload | None, streams: tuple[Tensor, ...], heads: int
    ):
        self.grad = torch.is_grad_enabled()
        self.policies, self.heads, self.index = policies, heads, 0
        self.dtype = streams[0].dtype
        lengths = [stream.shape[1] for stream in streams]
        self.tokens = (*lengths, sum(lengths))
        self.offload = offload if self.grad and "offload" in policies else None
        if self.grad and "offload" in policies and offload is None:
            raise ValueError("a block's policy is offload, and the model has no offload engine")
        if self.offload:
            self.offload.begin()

    def __call__(self, block: torch.nn.Module, streams: tuple[Tensor, ...], *inputs):
        """block(*streams, *inputs, saving). streams: the tensors that carry gradients."""
        policy, index = self.policies[self.index] if self.grad else "keep", self.index
        self.index += 1
        if policy == "replay":
            # no global generator is drawn from, so there is no state to keep
            outputs = checkpoint(
                block, *streams, *inputs, use_reentrant=False, preserve_rng_state=False
            )
            if self.offload:
                self.offload.block_forward_done(index)
            return outputs
        keeper = CodesKeeper() if policy == "8bit" else None
        if policy == "offload":
            keeper = self.offload.block(index)
            self._watch(streams, index)
        saving = Saving(policy, keeper, self.dtype, self.tokens, self.heads)
        with saving.hooks():
            outputs = block(*streams, *inputs, saving)
        if self.offload:
            self.offload.block_forward_done(index)
        return outputs

    def _watch(self, streams: tuple[Tensor, ...], index: int) -> None:
        """Tell the engine when the gradients of all the block's inputs have been launched."""
        watched = [stream for stream in streams if stream.requires_grad]
        left, offload = [len(watched)], self.offload

        def seen(_: Tensor) -> None:
            left[0] -= 1
            if left[0] == 0:
                offload.block_backward_done(index)

        for stream in watched:
            stream.register_hook(seen)

    def done(self) -> None:
        """All blocks have run; backward comes next."""
        if self.offload:
            self.offload.forward_done()
