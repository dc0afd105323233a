"""How a launch chooses its card and its specialization, and what it costs before Triton."""

import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import fluxfast_kernels as fk
import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.quant.nf4 import nf4_absmax, nf4_quantize
from torch.utils._python_dispatch import TorchDispatchMode


class OnCard:
    """A tensor of a card that is not here."""

    is_cuda = True

    def __init__(self, index: int):
        self.index = index

    def get_device(self) -> int:
        return self.index


@pytest.mark.parametrize("first", [OnCard(1), (OnCard(1), 3, 4)])
def test_a_kernel_is_launched_on_its_tensors_card(monkeypatch, first):
    """Not on the current one: a model on cuda:1 while cuda:0 is current."""
    current, launched = [0], []

    @contextmanager
    def device_of(tensor):
        before, current[0] = current[0], tensor.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    jitted = SimpleNamespace(run=lambda *_, **__: launched.append(current[0]))
    monkeypatch.setattr(backend, "triton", SimpleNamespace(jit=lambda *_, **__: jitted))
    made = backend.kernel(lambda: None)
    made.run(None, first, 5, grid=(1,), warmup=False)
    made.run(OnCard(0), grid=(1,), warmup=False)
    assert launched == [1, 0] and current == [0]


_ONE_SPECIALIZATION = """
import fluxfast_kernels as fk, torch
from bench.twin.driver import card
from fluxfast_kernels.gemm.linear import linear_backward, linear_forward

def kernels(T):
    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    N, K, fp32 = 256, 128, torch.float32
    weight = [new(N, K, dtype=torch.int8), new(N, dtype=fp32)]
    weight = fk.FrozenWeight(weight, matmul="int8")
    update = fk.LoRAUpdate(new(16, K, dtype=fp32), new(N, 16, dtype=fp32), (0, N, 0))
    with card(89) as launches:
        x = new(1, T, K)
        linear_forward([x], weight, update)
        linear_backward([new(1, T, N)], [x], weight, update, True)
        fk.norm_modulate(x, new(1, 1, K), new(1, 1, K))
    return {launch.kernel.key for launch in launches if launch.kernel}

even, odd = kernels(1536), kernels(1077)
assert len(even) >= 6 and even == odd, (len(even), len(even ^ odd))
"""


def test_a_scratch_made_during_a_capture_is_not_used_again(monkeypatch):
    """Its memory is the graph's, which may be gone by then."""
    device = torch.device("meta")
    monkeypatch.setattr(backend, "_gpu", {})
    monkeypatch.setattr(backend, "_capturing", lambda device: True)
    backend.scratch(8, torch.int8, device)
    assert backend._gpu[device, torch.int8] == []
    monkeypatch.setattr(backend, "_capturing", lambda device: False)
    backend.scratch(8, torch.int8, device)
    assert len(backend._gpu[device, torch.int8]) == 1


class Log(TorchDispatchMode):
    """The names of aten's ops."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stacked", [False, True])
def test_nested_absmax_is_one_launch(stacked):
    weight = nf4_quantize(torch.randn(96, 256), nested=True)
    if stacked:
        counts = weight.nested_absmax.numel()
        weight.offset = weight.offset + torch.arange(counts) / 7
    with backend.cpu_launches(False):
        expected = nf4_absmax(weight)
    with Log() as log:
        absmax = nf4_absmax(weight)
    assert log.names and not {"mul", "add", "index"} & set(log.names), log.names
    assert torch.equal(absmax, expected)


def attend(q, k, v):
    return fk.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def rope_attend(q, k, v):
    cos = torch.ones(1, q.shape[1], 1, q.shape[3] // 2)
    qkv = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    return fk.qk_norm_rope_attention([qkv], [torch.ones(q.shape[3])] * 2, cos, cos * 0, q.shape[2])


@pytest.mark.parametrize("attention", [attend, rope_attend])
def test_backward_makes_no_gradient_of_lse(attention):
    """Zeros that nothing reads: a launch and B·H·T·4 bytes a block."""
    B, T, H, C = 1, 5, 2, 32
    q, k, v = torch.randn(3, B, T, H, C).requires_grad_()
    y = attention(q, k, v)
    dy = torch.ones_like(y)
    with backend.cpu_launches(False), Log() as log:
        torch.autograd.backward(y, dy)
    assert log.names and not [name for name in log.names if "zero" in name], log.names


@pytest.mark.slow
def test_an_odd_number_of_tokens_compiles_nothing_anew():
    subprocess.run([sys.executable, "-c", _ONE_SPECIALIZATION], check=True)


def test_kernels_are_written_for_triton_3_6():
    """It passes no dataclass out of a constexpr on, and returns no None: 3.7 does both."""
    for path in Path(fk.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"SPEC\.tile\s*[,)]|return Weight\(w\.", text), path
