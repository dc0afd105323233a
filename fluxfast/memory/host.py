"""Optimizer state and frozen weights that live in pinned host memory.

`OptimizerOnHost` empties the storages of the state between steps and keeps the tensors: any
optimizer finds its state where it left it. `WeightsOnHost` streams the weights of layers that are
used one after the other through two buffers on the device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fluxfast.memory.copies import Copies
from fluxfast.memory.planner.timeline import aligned


@dataclass
class _Moved:
    """A storage of the state and its memory on the host. While it is away it has 0 bytes."""

    storage: torch.UntypedStorage
    host: Tensor  # uint8 [nbytes]

    def device_bytes(self, device: torch.device) -> Tensor:
        """The storage as uint8 [nbytes]."""
        return torch.empty(0, dtype=torch.uint8, device=device).set_(self.storage)


class OptimizerOnHost:
    """Keeps an optimizer's state on the host between steps.

        with on_host.resident():
            optimizer.step()

    State is what `optimizer.state` holds on the parameters' device with more than one element; each
    storage counts once, and one that a parameter or its gradient lies in stays. State that a step
    creates moves out at its end. Host memory is allocated when state first appears, in one piece,
    and used again after `load_state_dict`. Outside of `resident` the state must not be touched:
    `optimizer.step` and `optimizer.state_dict` then raise, and an optimizer's `train` and `eval`
    (schedule-free), which read it, bring it in by themselves.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, copies: Copies):
        self.optimizer, self._copies = optimizer, copies
        self._moved: dict[int, _Moved] = {}  # by the storage's identity
        self._spare: dict[int, list[Tensor]] = {}  # host memory of state that is gone, by size
        self._slabs: list[Tensor] = []
        self._computed, self._done = copies.event(), copies.event()
        self._depth = 0
        optimizer.register_step_pre_hook(self._require_resident)
        optimizer.register_state_dict_pre_hook(self._require_resident)
        for name in ("train", "eval"):
            if callable(mode := getattr(optimizer, name, None)):
                setattr(optimizer, name, self._within(mode))
        self._move_out()

    @property
    def host_bytes(self) -> int:
        """Host memory that was allocated for the state."""
        return sum(slab.numel() for slab in self._slabs)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The state is on the device inside; at the end it goes to the host. May be nested."""
        if not self._depth:
            self._bring_in()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._move_out()

    def _within(self, function):
        def call(*args, **kwargs):
            with self.resident():
                return function(*args, **kwargs)

        return call

    def _require_resident(self, *_) -> None:
        if not self._depth:
            raise RuntimeError(
                "the optimizer's state is on the host: use it inside `with on_host.resident()`"
            )

    def _storages(self) -> dict[int, torch.UntypedStorage]:
        """Of the state as it is now, those that may leave the device."""
        stay, movable = set(), {}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for tensor in [*parameters, *(p.grad for p in parameters if p.grad is not None)]:
            stay.add(tensor.untyped_storage()._cdata)

        def add(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            here = tensor.device.type == self._copies.device.type
            # on a CPU an optimizer may take over memory that torch.load owns
            if here and tensor.numel() > 1 and storage.resizable():
                movable[storage._cdata] = storage
            return tensor

        _mapped(list(self.optimizer.state.values()), add)
        return {key: storage for key, storage in movable.items() if key not in stay}

    def _bring_in(self) -> None:
        self._forget_gone(empty=True)
        self._fetch(list(self._moved.values()))

    def _fetch(self, moved: list[_Moved]) -> None:
        for each in moved:
            each.storage.resize_(each.host.numel())
        # compute may have used the memory a moment ago: after it
        self._copies.record_compute(self._computed)
        for each in moved:
            target = each.device_bytes(self._copies.device)
            self._copies.copy_in(each.host, target, [self._computed], self._done)
        if moved:
            self._copies.compute_wait(self._done)

    def _move_out(self) -> None:
        self._forget_gone(empty=False)
        new = {k: s for k, s in self._storages().items() if k not in self._moved and s.nbytes()}
        hosts = self._host_memory([storage.nbytes() for storage in new.values()])
        for (key, storage), host in zip(new.items(), hosts, strict=True):
            self._moved[key] = _Moved(storage, host)
        here = [each for each in self._moved.values() if each.storage.nbytes()]
        self._copies.record_compute(self._computed)
        for each in here:
            source = each.device_bytes(self._copies.device)
            self._copies.copy_out(source, each.host, [self._computed], self._done)
        if here:
            self._copies.compute_wait(self._done)  # before its memory may be used again
        for each in here:
            each.storage.resize_(0)

    def _forget_gone(self, empty: bool) -> None:
        """Forget state that the optimizer holds no more. empty: it is not on the device now, and is
        put back first, since its library may hold it (bitsandbytes keeps its code tables).
        """
        gone = self._moved.keys() - self._storages().keys()
        for each in [self._moved.pop(key) for key in gone]:
            if empty:
                self._fetch([each])
            self._spare.setdefault(each.host.numel(), []).append(each.host)

    def _host_memory(self, sizes: list[int]) -> list[Tensor]:
        """A host buffer of each size, from what is spare, the rest in one new piece."""
        hosts = [self._spare[n].pop() if self._spare.get(n) else None for n in sizes]
        wanted = [aligned(n) for n, host in zip(sizes, hosts, strict=True) if host is None]
        if wanted:
            self._slabs.append(self._copies.alloc_host(sum(wanted)))
            pieces = iter(self._slabs[-1].split(wanted))
            hosts = [
                next(pieces)[:n] if host is None else host
                for n, host in zip(sizes, hosts, strict=True)
            ]
        return cast(list[Tensor], hosts)


class WeightsOnHost:
    """Frozen weights of linears that are used in a known order, on the host; two buffers, each as
    large as the largest layer, bring them to the device, one layer ahead.

    layers: modules whose buffers, but for `bias`, are the frozen weight (`FrozenLinear`), in the
    order of their use; after the last comes the first. Their buffers become host tensors: moving
    the model to a device afterwards would undo it.
    """

    def __init__(self, layers: Sequence[nn.Module], copies: Copies):
        self._copies = copies
        self._index = {id(layer): index for index, layer in enumerate(layers)}
        self._layers = layers
        if len(self._index) != len(layers) or not layers:
            raise ValueError("layers must be at least one, and each only once")
        self._layouts, offset = [], 0  # per layer: its bytes on the host, and its tensors in them
        layouts = [_layout(layer) for layer in layers]
        self._host = copies.alloc_host(sum(nbytes for _, nbytes in layouts))
        for layer, (tensors, nbytes) in zip(layers, layouts, strict=True):
            host = self._host[offset : offset + nbytes]
            for name, piece in tensors.items():
                tensor = getattr(layer, name)
                setattr(layer, name, piece.within(host).copy_(tensor))
            self._layouts.append((host, list(tensors.values())))
            offset += nbytes
        count = min(2, len(layers))
        largest = max(nbytes for _, nbytes in layouts)
        self._staging = [copies.alloc_device(largest) for _ in range(count)]
        self._arrivals = [copies.event() for _ in range(count)]
        self._computed = copies.event()
        self._held: dict[int, int] = {}  # layer -> the buffer that holds it or will
        self._last = 0  # the buffer of the layer that was fetched last

    @property
    def host_bytes(self) -> int:
        return self._host.numel()

    @property
    def staging_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._staging)

    def fetch(self, layer: nn.Module) -> list[Tensor]:
        """The layer's frozen tensors on the device, in the order of its buffers. Good for what is
        launched before the next `fetch`. A layer out of turn is waited for; in turn it is there.
        """
        index = self._index[id(layer)]
        if index not in self._held:
            self._load(index)
        buffer = self._last = self._held[index]
        self._copies.compute_wait(self._arrivals[buffer])
        following = (index + 1) % len(self._layers)
        if following not in self._held:
            self._load(following)
        return [piece.within(self._staging[buffer]) for piece in self._layouts[index][1]]

    def _load(self, index: int) -> None:
        """Into the buffer not fetched from last, once compute is done with its earlier layer."""
        buffer = (self._last + 1) % len(self._staging)
        self._held = {i: b for i, b in self._held.items() if b != buffer} | {index: buffer}
        host = self._layouts[index][0]
        self._copies.record_compute(self._computed)
        target = self._staging[buffer][: host.numel()]
        self._copies.copy_in(host, target, [self._computed], self._arrivals[buffer])


@dataclass(frozen=True)
class _Piece:
    """A tensor's bytes and form within its layer's."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def within(self, memory: Tensor) -> Tensor:
        flat = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


def _layout(layer: nn.Module) -> tuple[dict[str, _Piece], int]:
    """Returns a layer's frozen tensors in one stretch of memory, by name, and its bytes."""
    pieces, end = {}, 0
    for name, tensor in layer.named_buffers(recurse=False):
        if name != "bias":
            compact = torch.empty_like(tensor, device="meta")  # strides without gaps
            stride = compact.stride()
            pieces[name] = _Piece(end, tensor.nbytes, tensor.dtype, tensor.shape, stride)
            end += aligned(tensor.nbytes)
    return pieces, end


def _mapped(value: Any, change) -> Any:
    """Returns the same nest of dicts and lists with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, change) for each in value)
    return value
