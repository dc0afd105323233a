"""Triton over the driver of a card that is not here: launches are recorded, kernels compiled later.

    with card(89) as launches:      # compute capability 8.9
        ...                         # launchers of fluxfast_kernels, on meta tensors
    launches[0].kernel.compile().asm["cubin"]

Inside, ops on meta tensors launch their kernels, dispatch sees the card, and Triton specializes
every argument as it does there (== 1, % 16; a meta tensor's address is its offset in its storage).
A kernel is compiled when it is asked for, by the ptxas of Triton's wheel; nothing is executed. A
process that interprets (TRITON_INTERPRET) cannot compile.
"""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import fluxfast_kernels as fk
import torch
import triton
from fluxfast_kernels.dispatch import attention as attention_rows
from fluxfast_kernels.dispatch import backend, dispatch
from fluxfast_kernels.ops import attention
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compiler
from triton.runtime import driver, jit

# what a block may use: bytes of shared memory
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


class Kernel(NamedTuple):
    """A kernel as one launch specializes it. key: of source, specialization, options, card and
    compiler, as in Triton's own cache."""

    name: str
    key: str
    source: ASTSource
    target: GPUTarget
    options: Any

    def compile(self) -> Any:
        """Returns Triton's CompiledKernel."""
        return triton.compile(self.source, target=self.target, options=self.options.__dict__)

    def constants(self) -> str:
        """Returns what it is specialized for: constexprs, and the arguments that are 1 or None."""
        named = (
            (self.source.fn.arg_names[at], rest, value) for (at, *rest), value in _sorted(self)
        )
        return " ".join(f"{'.'.join([name, *map(str, rest)])}={v}" for name, rest, v in named)


def _sorted(kernel: Kernel) -> list:
    return sorted(kernel.source.constants.items(), key=lambda item: item[0])


class Launch(NamedTuple):
    """name: of the kernel's function, or "aten::" and the op's; kernel: None for aten's."""

    name: str
    grid: tuple[int, ...]
    kernel: Kernel | None = None


class _Driver:
    """What Triton asks of a driver before it launches. A card's number is its capability, under
    which Triton caches its kernels."""

    def __init__(self, arch: int):
        self.arch, self.target = arch, GPUTarget("cuda", arch, 32)
        self.launches: list[Launch] = []

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class _Recorded:
    """Stands for a compiled kernel where Triton launches one."""

    function = packed_metadata = None

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def launch_metadata(self, grid, *_) -> None:
        driver.active.launches.append(Launch(self.kernel.name, tuple(grid), self.kernel))

    def run(self, *_) -> None:
        pass


def _specialize(self, key, signature, device, constexprs, options, attrs, warmup) -> _Recorded:
    """What takes the place of JITFunction._do_compile."""
    kernels, _, target, backend, *_ = self.device_caches[device]
    source = ASTSource(self, signature, constexprs, attrs)
    whole = compiler.get_cache_key(source, backend, options, {})
    named = hashlib.sha256(whole.encode()).hexdigest()[:32]
    kernels[key] = _Recorded(Kernel(self.fn.__name__, named, source, target, options))
    return kernels[key]


_triton_update_hash = jit.DependenciesFinder._update_hash


def _update_hash(self, func) -> None:
    """What takes the place of DependenciesFinder._update_hash. Triton 3.7.1's own merges a helper's
    constants into its caller's key only if the helper's key was read earlier, so that keys differ
    between processes: here it is read first."""
    hash(func)
    _triton_update_hash(self, func)


class Step(TorchDispatchMode):
    """Runs the ops' own launchers on meta tensors, and records aten's kernels among the launches.

    An op of torch.library on a meta tensor would run its fake: here it runs the function that runs
    on a card.
    """

    def __init__(self, launches: list[Launch]):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fluxfast":
            with self:
                return OPS[func.name()]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not _is_view(func) and name not in _FREE:
            shape = next((tuple(x.shape) for x in args if isinstance(x, torch.Tensor)), ())
            self.launches.append(Launch(f"aten::{name}", shape))
        return out


def _is_view(func) -> bool:
    """Returns whether an op returns a view: an alias that it does not write to."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info and not r.alias_info.is_write for r in returns)


# no kernel: new memory, and what is a view in effect
_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"),
    *("lift_fresh", "set_", "_unsafe_view", "_reshape_alias", "_local_scalar_dense"),
}


def _ops() -> dict[str, CustomOpDef]:
    """Returns "fluxfast::name" -> op of every op of fluxfast_kernels."""
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{fk.__name__}.")]
    values = (value for module in modules for value in vars(module).values())
    return {op._qualname: op for op in values if isinstance(op, CustomOpDef)}


OPS = _ops()


@contextmanager
def card(arch: int, attention_backend: str = "auto") -> Iterator[list[Launch]]:
    """Returns the context in which launches are recorded as on a card of compute capability `arch`
    (89: 8.9), and the list that they are added to. attention_backend: in place of the card's."""
    fake = _Driver(arch)

    def resolve(name: str, q: torch.Tensor) -> str:
        name = attention_backend if name == "auto" else name
        chosen = attention_rows.choose_backend(arch, q.dtype, q.shape[3], q.shape[2])
        return chosen[0] if name == "auto" else name

    modules = [m for name, m in sys.modules.items() if name.startswith(fk.__name__)]
    patches = [
        *(patch.object(m, "arch_of", lambda _: arch) for m in modules if hasattr(m, "arch_of")),
        patch.object(attention, "_resolve", resolve),
        patch.object(backend, "_cpu_launches", True),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # it knows no meta device
        patch.object(jit.JITFunction, "_do_compile", _specialize),
        patch.object(jit.DependenciesFinder, "_update_hash", _update_hash),
        patch.object(driver, "_active", fake),
    ]
    assert dispatch.arch_of in (m.arch_of for m in modules if hasattr(m, "arch_of"))
    for each in patches:
        each.start()
    try:
        with Step(fake.launches):
            yield fake.launches
    finally:
        for each in reversed(patches):
            each.stop()
