"""Optimizer state and frozen weights in pinned host memory.

`OptimizerOnHost` empties the storages of the state between steps and keeps the tensors: any
optimizer finds its state where it left it. `WeightsOnHost` streams the weights of layers that are
used one after the other through two buffers on the device.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fluxfast.memory.copies import Copies, PinRefused
from fluxfast.memory.planner.timeline import STAGING_BUFFERS, aligned

log = logging.getLogger(__name__)


class _Moved(NamedTuple):
    """A storage of the state, of 0 bytes while it is away, and its memory on the host."""

    storage: torch.UntypedStorage
    host: Tensor  # uint8 [nbytes]

    def on_device(self, device: torch.device) -> Tensor:
        """Returns the storage as uint8 [nbytes]."""
        return torch.empty(0, dtype=torch.uint8, device=device).set_(self.storage)


class OptimizerOnHost:
    """Keeps an optimizer's state on the host between steps.

        with on_host.resident():
            optimizer.step()

    State is what `optimizer.state` holds on the parameters' device with more than one element; each
    storage counts once, and one that a parameter or its gradient lies in stays. State that a step
    creates moves out at its end. Host memory is allocated when state first appears, in one piece,
    and used again after `load_state_dict`; where the system refuses it then, all state stays on
    the device; for the state that is there at the beginning PinRefused is raised. Outside of
    `resident` the state must not be touched: `optimizer.step` and `optimizer.state_dict` then
    raise, and an optimizer's `train` and `eval` (schedule-free), which read it, bring it in.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, copies: Copies):
        self.optimizer, self._copies = optimizer, copies
        self._moved: dict[int, _Moved] = {}  # by the storage's identity
        self._spare: dict[int, list[Tensor]] = {}  # host memory of state that is gone, by size
        self.host_bytes = 0  # allocated
        self._depth = 0
        optimizer.register_step_pre_hook(self._require_resident)
        optimizer.register_state_dict_pre_hook(self._require_resident)
        for name in ("train", "eval"):
            if callable(mode := getattr(optimizer, name, None)):
                setattr(optimizer, name, self.resident()(mode))
        self._move_out()

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The state is on the device inside; at the end it goes to the host. May be nested."""
        if not self._depth:
            self._forget_gone(empty=True)
            self._bring_in(list(self._moved.values()))
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                try:
                    self._move_out()
                except PinRefused as error:
                    log.warning(f"note: {error.message}; the optimizer's state stays on the GPU")
                    self._depth += 1  # as inside of one that does not end

    def _require_resident(self, *_) -> None:
        if not self._depth:
            raise RuntimeError(
                "the optimizer's state is on the host: use it inside `with on_host.resident()`"
            )

    def _storages(self) -> dict[int, torch.UntypedStorage]:
        """Returns the storages of the current state that may leave the device, by identity."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        stay = {tensor.untyped_storage()._cdata for tensor in tensors}
        movable = {}
        for leaf in tree_leaves(list(self.optimizer.state.values())):
            if isinstance(leaf, Tensor) and leaf.numel() > 1:
                storage = leaf.untyped_storage()
                here = leaf.device.type == self._copies.device.type
                # on a CPU an optimizer may take over memory that torch.load owns
                if here and storage.resizable() and storage._cdata not in stay:
                    movable[storage._cdata] = storage
        return movable

    def _bring_in(self, moved: list[_Moved]) -> None:
        if not moved:
            return
        for each in moved:
            each.storage.resize_(each.host.numel())
        device = self._copies.device
        arrived = self._copies.copy_in([(each.host, each.on_device(device)) for each in moved])
        self._copies.compute_wait(arrived)

    def _move_out(self) -> None:
        self._forget_gone(empty=False)
        new = {k: s for k, s in self._storages().items() if k not in self._moved and s.nbytes()}
        hosts = self._host_memory([storage.nbytes() for storage in new.values()])
        for (key, storage), host in zip(new.items(), hosts, strict=True):
            self._moved[key] = _Moved(storage, host)
        here = [each for each in self._moved.values() if each.storage.nbytes()]
        device = self._copies.device
        copied = self._copies.copy_out([(each.on_device(device), each.host) for each in here])
        self._copies.compute_wait(copied)  # before its memory may be used again
        for each in here:
            each.storage.resize_(0)

    def _forget_gone(self, empty: bool) -> None:
        """Forgets state that the optimizer no longer holds. empty: it is not on the device now, and
        is put back first, since its library may hold it (bitsandbytes keeps its code tables).
        """
        gone = [self._moved.pop(key) for key in self._moved.keys() - self._storages().keys()]
        if empty:
            self._bring_in(gone)
        for each in gone:
            self._spare.setdefault(each.host.numel(), []).append(each.host)

    def _host_memory(self, sizes: list[int]) -> list[Tensor]:
        """Returns a host buffer of each size, from what is spare, the rest in one new piece."""
        hosts = [self._spare[n].pop() if self._spare.get(n) else None for n in sizes]
        missing = [aligned(n) for n, host in zip(sizes, hosts, strict=True) if host is None]
        pieces: Iterator[Tensor] = iter(())
        if missing:
            self.host_bytes += sum(missing)
            pieces = iter(self._copies.alloc_host(sum(missing)).split(missing))
        return [
            next(pieces)[:n] if host is None else host for n, host in zip(sizes, hosts, strict=True)
        ]


class WeightsOnHost:
    """Frozen weights, on the host, of linears that are used in a known order; two buffers, each as
    large as the largest layer, bring them to the device, one layer ahead.

    layers: at least two modules whose buffers, but for `bias`, are the frozen weight
    (`FrozenLinear`), in the order of their use; after the last comes the first. Their buffers
    become host tensors: moving the model to a device afterwards would undo it.
    """

    def __init__(self, layers: Sequence[nn.Module], copies: Copies):
        self._copies = copies
        self._index = {id(layer): index for index, layer in enumerate(layers)}
        self._layouts: list[tuple[Tensor, list]] = []  # a layer's host memory, its pieces
        layouts = [_layout(layer) for layer in layers]
        sizes = [nbytes for _, nbytes in layouts]
        hosts = copies.alloc_host(sum(sizes)).split(sizes)
        for layer, (pieces, _), host in zip(layers, layouts, hosts, strict=True):
            for name, piece in pieces.items():
                setattr(layer, name, _view(host, *piece).copy_(getattr(layer, name)))
            self._layouts.append((host, list(pieces.values())))
        self._staging = [copies.alloc_device(max(sizes)) for _ in range(STAGING_BUFFERS)]
        self._held: dict[int, tuple[int, Any]] = {}  # layer -> (buffer, arrival event)
        self._last = 0  # the buffer of the layer that was fetched last

    def fetch(self, layer: nn.Module) -> list[Tensor]:
        """Returns the layer's frozen tensors on the device, in the order of its buffers, valid for
        what is launched before the next `fetch`. Compute waits for a layer out of turn; in turn it
        is there.
        """
        index = self._index[id(layer)]
        self._load(index)
        self._last, arrival = self._held[index]
        self._copies.compute_wait(arrival)
        self._load((index + 1) % len(self._layouts))
        staging = self._staging[self._last]
        return [_view(staging, *piece) for piece in self._layouts[index][1]]

    def _load(self, index: int) -> None:
        """Copies a layer that is not there into the buffer not fetched from last, once compute is
        done with that buffer's layer."""
        if index not in self._held:
            buffer = (self._last + 1) % STAGING_BUFFERS
            self._held = {i: held for i, held in self._held.items() if held[0] != buffer}
            host, _ = self._layouts[index]
            pair = host, self._staging[buffer][: host.numel()]
            self._held[index] = buffer, self._copies.copy_in([pair])


def _layout(layer: nn.Module) -> tuple[dict[str, tuple[int, Tensor]], int]:
    """Returns a layer's frozen tensors in one stretch of memory, (offset, form on the meta device)
    by name, and its bytes."""
    pieces, end = {}, 0
    for name, tensor in layer.named_buffers(recurse=False):
        if name != "bias":
            pieces[name] = end, torch.empty_like(tensor, device="meta")  # strides without gaps
            end += aligned(tensor.nbytes)
    return pieces, end


def _view(memory: Tensor, offset: int, form: Tensor) -> Tensor:
    """Returns the bytes from `offset` on as a tensor like `form`."""
    flat = memory[offset : offset + form.nbytes].view(form.dtype)
    return flat.as_strided(form.shape, form.stride(), flat.storage_offset())
