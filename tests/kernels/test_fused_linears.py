"""The three fused linears, in x's dtype and in 8 bits: results and every gradient against fp64, by
the launchers and in plain torch; what they save, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import DTYPES
from fluxfast_kernels.gemm.epilogue import LoRAUpdate
from fluxfast_kernels.ops.lora_linear import _lora_linear, flatten, lora_linear
from fluxfast_kernels.quant import frozen
from fluxfast_kernels.quant.nf4 import nf4_quantize
from fused_linears import (
    BF16,
    IN_8_BITS,
    B,
    Case,
    K,
    N,
    Problem,
    T,
    case,
    check_against_truth,
    gelu,
    norm,
)
from numerics import (
    assert_same_bits,
    opcheck,
    relative_error,
    saved_for_backward,
    skip_without_fp8,
)

IN_DTYPE = [
    case(op, dtype=dtype, **options)
    for dtype in DTYPES
    for op, options in [
        ("linear", {"gate": True}),
        ("linear", {"storage": "nf4", "rank": 1, "parts": (0, 64, 0, 64, 144, 0)}),
        ("linear", {"storage": "nested", "gate": True, "rank": 40}),
        ("linear", {"parts": ()}),
        ("norm", {"split": 64, "parts": (0, 48, 0, 48, 96, 1, 112, 144, 0)}),
        ("norm", {"storage": "nested", "rank": 16}),
        ("norm", {"storage": "nf4", "split": 16, "parts": ()}),
        ("gelu", {"storage": "nested", "gate": True, "head": 64}),
        ("gelu", {"rank": 16}),
        ("gelu", {"head": 64, "parts": (), "bias": False}),
    ]
]
OPS = {
    "linear": Case("linear", gate=True, storage="nf4"),
    "norm": Case("norm", split=80),
    "gelu": Case("gelu", head=64, gate=True),
    "gelu alone": Case("gelu", parts=()),
    "linear int8": Case("linear", "int8", gate=True, storage="nf4"),
    "norm int8": Case("norm", "int8", split=80, storage="int8", rotation=32),
    "gelu int8": Case("gelu", "int8", head=64, gate=True, storage="int8", saved_bits=8),
}


# ---------------------------------------------------------------- results and gradients


def check_case(case: Case, device: str) -> None:
    skip_without_fp8(case.matmul, device)
    problem = Problem(case, device)
    results = problem.gradients()
    for name, value in results.items():
        dtype = problem.leaves[name].dtype if name in problem.leaves else case.dtype
        assert value.dtype == dtype and (name[0] != "y" or value.is_contiguous()), name
    check_against_truth(problem, results)


@pytest.mark.grid(10)
@pytest.mark.parametrize("case", IN_DTYPE)
def test_in_the_inputs_dtype(path, device, case):
    check_case(case, device)


@pytest.mark.grid(2)
@pytest.mark.parametrize("case", IN_8_BITS)
def test_in_8_bits(path, device, case):
    if device == "cuda" and case.matmul == "fp8" and case.dtype == torch.float32:
        pytest.skip("tensor cores sum e4m3 below fp32's precision: judged in bf16")
    check_case(case, device)


@pytest.mark.grid(4)
@pytest.mark.parametrize(
    "case",
    [
        *(case("gelu", matmul=m, dtype=BF16, head=64, gate=True) for m in ("", "int8", "fp8")),
        *(case("norm", split=64), case("norm", dtype=BF16)),
    ],
)
def test_the_ops_own_reference(path, device, case):
    """gelu's forms gelu(u) itself: in bf16 nearly every 8-bit value is the kernel's."""
    skip_without_fp8(case.matmul, device)
    problem = Problem(case, device)
    check_against_truth(problem, problem.gradients(), problem.public_reference)


@pytest.mark.grid(2)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("matmul", ["", "int8"])
def test_u_saved_in_8_bits(path, device, dtype, matmul):
    """The result is that of u; the gradients are those of the dequantized u, and near u's."""
    case = Case("gelu", matmul, dtype=dtype, head=64, gate=True)
    exact = Problem(case, device)
    expected = exact.gradients()
    results = Problem(replace(case, saved_bits=8), device).gradients()
    for name in ("y0", "head", "residual"):  # dx does not read u
        assert torch.equal(results[name], expected[name]), name
    for name in ("u", "lora_a", "lora_b"):  # measured: 0.6, 0.4, 0.3 %
        assert 0 < relative_error(results[name], expected[name]) < 0.01, name
    if not matmul:
        _, u8, row_scale, _ = gelu.gelu_rows(exact.leaves["u"], 8)
        saved = exact.with_leaves(u=gelu._dequantize(u8, row_scale))
        check_against_truth(saved, {n: results[n] for n in ("u", "head", "lora_a", "lora_b")})


# ---------------------------------------------------------------- the same bits


@pytest.mark.grid(3)
@pytest.mark.parametrize("op", OPS)
def test_another_run_and_one_under_autocast_give_the_same_bits(path, device, op):
    problem = Problem(OPS[op], device)
    first, again = problem.gradients(), problem.gradients()
    with torch.autocast(device, BF16):
        autocast = problem.gradients()
    assert_same_bits(again, first)
    assert_same_bits(autocast, first)


@pytest.mark.grid(3)
@pytest.mark.parametrize("op", OPS)
def test_each_gradient_alone(path, device, op):
    """Only what is asked for is formed, here of sums, whose gradients are expanded. 8-bit products
    quantize nothing for A and B alone, which then come from another tile."""
    problem = Problem(OPS[op], device)
    problem.dys = [torch.ones_like(dy) for dy in problem.dys]
    whole, tolerance = problem.gradients(), 1e-5 if problem.case.matmul else 0.0
    for wanted in problem.leaves:
        leaves = {n: v.detach().requires_grad_(n == wanted) for n, v in problem.leaves.items()}
        sum(y.sum() for y in problem.call(leaves)).backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
        torch.testing.assert_close(
            leaves[wanted].grad, whole[wanted], rtol=tolerance, atol=tolerance / 10
        )


@pytest.mark.grid(2)
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("matmul", ["", "int8"])
def test_one_output_that_is_not_used(path, device, matmul, used):
    """Its gradient is zeros: in 8 bits a scale of 1e-30 / 127 and values of 0."""
    problem = Problem(Case("norm", matmul, split=80), device)
    problem.dys[1 - used] = torch.zeros_like(problem.dys[1 - used])
    expected = problem.gradients()
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in problem.leaves.items()}
    y, dy = problem.call(leaves)[used], problem.dys[used]
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    for name, value in zip(leaves, gradients, strict=True):
        assert torch.equal(value, expected[name]) and value.any(), name


# ---------------------------------------------------------------- as torch sees the ops


@pytest.mark.parametrize(
    ("case", "per_token"),
    [
        (Case("linear", dtype=BF16, gate=True), 2 * K),
        (Case("norm", dtype=BF16), 2 * K + 8),
        (Case("gelu", dtype=BF16, head=48, gate=True), 2 * K),
        (Case("gelu", dtype=BF16, head=48, gate=True, saved_bits=8), 2 * 48 + 80 + 8),
    ],
)
def test_what_is_saved(device, case, per_token):
    """x, or h with mean and rstd, or u in 16 or 8 bits and head; the modulation, the gate, A and B.
    Neither what the linear multiplies nor y nor residual."""
    problem = Problem(case, device)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in problem.leaves.items()}
    with saved_for_backward() as saved:
        problem.call(leaves)
    saved = {x.data_ptr(): x for x in saved}
    assert sum(x.nbytes for x in saved.values() if x.shape[:2] == (B, T)) == per_token * B * T
    rest = {address for address, x in saved.items() if x.shape[:2] != (B, T)}
    small = [leaves[name] for name in ("shift", "scale", "lora_a", "lora_b") if name in leaves]
    small += [] if problem.gate is None else [problem.gate]
    assert rest == {x.data_ptr() for x in small}


def test_compiles_as_one_graph(device):
    problems = [Problem(case, device) for case in OPS.values()]

    def every(leaves):
        return [y for p, given in zip(problems, leaves, strict=True) for y in p.call(given)]

    def run(function):
        leaves = [{n: v.detach().requires_grad_() for n, v in p.leaves.items()} for p in problems]
        ys = function(leaves)
        dys = [dy for p in problems for dy in p.dys]
        flat = [leaf for each in leaves for leaf in each.values()]
        return [*ys, *torch.autograd.grad(ys, flat, dys)]

    with backend.cpu_launches(False):  # what an op does inside is not the graph's
        results = run(torch.compile(every, fullgraph=True, backend="aot_eager"))
        assert_same_bits(results, run(every))


@pytest.mark.grid(2)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op):
    problem = Problem(OPS[op], device)
    leaves = {n: v.detach().requires_grad_() for n, v in problem.leaves.items()}
    opcheck(lambda: problem.call(leaves))


def test_gradcheck():
    problem = Problem(Case("linear", gate=True, dtype=torch.float64), "cpu")
    values = [leaf.double().requires_grad_() for leaf in problem.leaves.values()]

    def call(*values):
        leaves = dict(zip(problem.leaves, values, strict=True))
        linear = flatten(problem.frozen(problem.bias), problem.update(leaves))
        return _lora_linear(leaves["x"], *linear, problem.gate, leaves["residual"])

    with backend.cpu_launches(False):
        assert torch.autograd.gradcheck(call, values, fast_mode=True)


# ---------------------------------------------------------------- refusals

ONES, NF4_STATISTICS = torch.ones(2, 1, K), ("packed", "absmax", "nested_absmax", "offset")
W = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
INT8, FP8 = (list(frozen.quantize_8bit(W, kind)) for kind in ("int8", "fp8"))
VALUES, SCALE = INT8
NF4_OF_ANOTHER_K = list(nf4_quantize(W.view(2 * N, -1)).tensors().values())
BY_OP = {
    "linear": [
        ("weight", {"x": torch.zeros(B, T, 96)}),
        ("x", {"x": torch.zeros(B, T, K, dtype=torch.int32)}),
        ("parts", {"parts": (0, 48)}),
        ("parts", {"parts": (0, 500, 0)}),
        ("parts", {"parts": (64, 144, 0, 0, 48, 1)}),
        ("parts", {"parts": (0, 48, 0, 64, 144, -1)}),
        ("bias", {"bias": torch.zeros(2 * N)}),
        ("bias", {"bias": SCALE[1:], "weight": INT8, "matmul": "int8"}),
        ("weight", {"weight": [VALUES]}),
        ("rotation", {"rotation": 32}),
        *(("rotation", {"matmul": "int8", "rotation": r}) for r in (48, -2, 1, 512)),
        ("matmul", {"matmul": "INT8"}),
        ("matmul", {"matmul": "int8", "weight": FP8}),
        ("matmul", {"matmul": "fp8", "weight": INT8}),
        (r"weight \(quantized\)", {"matmul": "int8", "weight": [VALUES.T.contiguous().T, SCALE]}),
        (r"weight \(scale\)", {"matmul": "int8", "weight": [VALUES, SCALE, SCALE, SCALE]}),
        *(
            (r"weight \(scale\)", {"matmul": "int8", "weight": [VALUES, wrong]})
            for wrong in (SCALE[1:], SCALE.double(), SCALE[:, None], SCALE.repeat(2)[::2])
        ),
        *(
            ("weight", {"matmul": "int8", "weight": wrong})
            for wrong in ([VALUES], [W.int()], [VALUES[:, :64], SCALE], [VALUES[0], SCALE], [W] * 3)
        ),
        (r"weight \(absmax\)", {"weight": [torch.zeros(N, K // 2).byte(), torch.zeros(5)]}),
    ],
    "norm": [
        ("h", {"h": torch.zeros(B, T, K).double()}),
        ("h", {"h": torch.zeros(T, K)}),
        ("h", {"h": torch.zeros(B, K, T).mT}),
        ("h", {"h": torch.zeros(1, 1, 2 * norm.MAX_WIDTH)}),
        ("shift", {"shift": ONES[:, 0]}),
        ("shift", {"shift": ONES.bfloat16()}),
        ("scale", {"scale": ONES[..., :64]}),
        ("scale", {"scale": ONES[..., :1].expand_as(ONES)}),
        ("split", {"split": N}),
        ("matmul", {"matmul": "bf16"}),
        ("rotation", {"matmul": "int8", "rotation": 48}),
    ],
    "gelu": [
        ("u", {"u": torch.zeros(B, T, 80).double()}),
        ("u", {"u": torch.zeros(B, T, 160)[..., ::2]}),
        ("u", {"u": torch.zeros(T, 80)}),
        ("head", {"head": torch.zeros(B, T, 48).half()}),
        ("head", {"head": torch.zeros(B, T - 1, 48)}),
        ("saved_bits", {"saved_bits": 4}),
        ("matmul", {"matmul": "fp4"}),
        ("rotation", {"matmul": "int8", "rotation": 32}),  # head is 48 wide
    ],
}
BY_EVERY_OP = [
    ("weight", {"weight": NF4_OF_ANOTHER_K, "parts": ()}),  # with as many values as one of x's K
    ("weight", {"weight": [NF4_OF_ANOTHER_K[0].view(-1, 1), NF4_OF_ANOTHER_K[1]], "parts": ()}),
    ("weight", {"weight": W}),
    ("lora_a", {"lora_a": torch.zeros(8, K).bfloat16()}),
    ("lora_a", {"lora_a": torch.zeros(8 * K)}),
    ("lora_b", {"lora_b": torch.zeros(128, 4).half()}),
    ("weight", {"weight": [torch.zeros(N, K - 1)]}),
    ("weight", {"weight": [torch.zeros(N, K)] * 3}),
    ("lora_a", {"lora_a": torch.zeros(3, K)}),
    ("lora_b", {"lora_b": None}),
    ("lora_b", {"lora_b": torch.zeros(7, 4)}),
]
BY_GATED_OPS = [
    ("gate", {"gate": None}),
    ("gate", {"gate": torch.zeros(1, 1, N)}),
    ("gate", {"gate": torch.zeros(B, 1, N).bfloat16()}),
    ("gate", {"gate": torch.zeros(B, 1, N, requires_grad=True)}),
    ("residual", {"residual": None}),
    ("residual", {"residual": torch.zeros(B, 3, N)}),
    ("residual", {"residual": torch.zeros(B, T, N).bfloat16()}),
]
REFUSED = [(op, *row) for op, rows in BY_OP.items() for row in rows]
REFUSED += [(op, *row) for op in BY_OP for row in BY_EVERY_OP]
REFUSED += [(op, *row) for op in ("linear", "gelu") for row in BY_GATED_OPS]


def problem_with(op: str, **changed) -> Problem:
    """A problem whose arguments fit, but for `changed`."""
    problem = Problem(Case(op, gate=op != "norm", head=48 if op == "gelu" else 0), "cpu")
    for name, value in changed.items():
        if name in problem.leaves:
            problem.leaves[name] = value
        elif hasattr(problem, name):
            setattr(problem, name, value)
        else:
            problem.case = replace(problem.case, **{name: value})
    return problem


@pytest.mark.parametrize(("op", "name", "changed"), REFUSED)
def test_wrong_arguments_are_named(op, name, changed):
    problem = problem_with(op, **changed)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        problem.call(problem.leaves)


def test_what_is_no_weight_and_no_update_is_named():
    """A tensor, a list or an NF4Tensor for a FrozenWeight; several updates for one."""
    x, update = torch.zeros(B, T, K), LoRAUpdate(torch.zeros(4, K), torch.zeros(N, 4), (0, N, 0))
    for wrong in (W, [W], frozen.FrozenWeight(nf4_quantize(W))):
        with pytest.raises(ValueError, match=r"^weight must be .*FrozenWeight\(\[W\]\)"):
            lora_linear(x, wrong)
    for wrong in ([update], [update, update], tuple(update)):
        with pytest.raises(ValueError, match="^update must be one LoRAUpdate"):
            lora_linear(x, frozen.FrozenWeight([W]), wrong)


@pytest.mark.parametrize("part", range(4))
def test_nf4_statistics_that_were_cast_are_refused(part):
    """As `.to(torch.bfloat16)` of a whole module would do."""
    problem = Problem(Case("linear", storage="nested"), "cpu")
    problem.weight[part] = problem.weight[part].bfloat16()
    with pytest.raises(ValueError, match=rf"^weight \({NF4_STATISTICS[part]}\) must be"):
        problem.call(problem.leaves)
