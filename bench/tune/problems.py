"""The shapes at which a training step of FLUX.1-dev runs each kernel, and their share of the step.

The cost model (`fluxfast/memory/planner/cost.py`) names every op of a step; here each becomes the
question that dispatch is asked for it: rows M, output columns N, a contraction of K. Equal
questions are one problem, whose share is the sum of theirs, the largest over the compute kinds.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import choose_backend
from fluxfast_kernels.quant.rows import DTYPE

from bench.tune.space import KERNELS, Kernel
from fluxfast.memory.planner import cost
from fluxfast.memory.planner.cards import Card
from fluxfast.memory.planner.cost import Op, Shape, StepSpec, seconds
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.names import linear_shape
from fluxfast.model.spec import FluxSpec

COMPUTES = ("bf16", "int8", "fp8")
PRODUCT_DTYPE = {"half": torch.bfloat16} | DTYPE
# M of the hand-over between two ways; the last ones are pictures of 512, 768 and 1024 px
HAND_OVER_ROWS = (16, 32, 64, 128, 256, 512, 1024, 1536, 2816, 4608)
ONE_WAY = Kernel("gemm_8bit", "dense", "int8")  # torch has no product with the scales in it


@dataclass(frozen=True)
class Problem:
    """One question to dispatch. linear: a BFL name that asks it, or "" for attention's kernels,
    where M is the tokens, N the heads and K their width. what: the cost model's word for the op.
    share: of a step's time, as the cost model has it."""

    kernel: Kernel
    M: int
    N: int
    K: int
    linear: str
    what: str
    share: float


@dataclass(frozen=True)
class HandOver:
    """Two ways for one product, `dispatch.choose`'s "fused" and "decode", at rising M. share: that
    of the product's least problem, so that its tiles are timed before."""

    kernel: Kernel
    N: int
    K: int
    linear: str
    what: str
    share: float


def problems(
    spec: FluxSpec, card: Card, arch: int, sizes: Iterable[tuple[int, int]], rank: int
) -> list[Problem]:
    """Of steps at `sizes` (pixels a side, batch), the largest share first."""
    found: dict[tuple, Problem] = {}
    for pixels, batch in sizes:
        shape = cost.shape_of(pixels, pixels, batch, spec.text_length)
        for compute in COMPUTES:
            if not card.peaks[compute]:
                continue
            work = StepSpec(spec, "nf4", compute, "bf16", cost.lora_of(spec, rank))
            for key, problem in _of_step(work, shape, card, arch).items():
                if key not in found or found[key].share < problem.share:
                    found[key] = problem
    return sorted(found.values(), key=lambda p: -p.share)


def hand_overs(found: list[Problem]) -> list[HandOver]:
    """Of every product among the problems, from each storage that has a second way."""
    products: dict[tuple, list[Problem]] = defaultdict(list)
    for problem in found:
        if problem.what in ("product", "dx"):
            products[problem.kernel.op, problem.kernel.dtype, problem.N, problem.K].append(problem)
    pairs = []
    for (op, dtype, N, K), same in products.items():
        blocks = [problem for problem in same if "mod" not in problem.linear] or same
        first, share = blocks[0], blocks[-1].share
        for kernel in KERNELS:
            if (kernel.op, kernel.dtype) == (op, dtype) and kernel != ONE_WAY:
                pairs.append(HandOver(kernel, N, K, first.linear, first.what, share))
    return pairs


def _of_step(work: StepSpec, shape: Shape, card: Card, arch: int) -> dict[tuple, Problem]:
    step = [op for op in cost.step_ops(work, shape) if "mod" not in op.name]
    whole = cost.total_seconds(step, card)
    times = [(op, seconds(op, card)) for op in step]
    # modulation is formed for several steps at once
    ahead = cost.modulation_ops(work, MODULATION_ROWS).forward
    times += [(op, seconds(op, card) * shape.batch / MODULATION_ROWS) for op in ahead]
    found: dict[tuple, Problem] = {}
    for op, time in times:
        for kernel, M, N, K, part in _questions(work, op, shape, arch):
            key, (linear, _, what) = (kernel, M, N, K), op.name.partition(" ")
            same = found.get(key) or Problem(*key, linear, what, 0.0)
            found[key] = replace(same, share=same.share + part * time / whole)
    return found


def _questions(work: StepSpec, op: Op, shape: Shape, arch: int) -> list[tuple]:
    """(kernel, M, N, K, its part of the op's time) of each launch that asks dispatch."""
    linear, _, what = op.name.partition(" ")
    if "blocks." in linear and linear.count(".") > 1:
        asked = _of_linear(work, linear, what, _rows(linear, shape), arch)
        return [] if asked is None else [(*asked, 1.0)]
    # of attention one sample's tokens stand for all
    T, heads, C = shape.tokens, work.spec.num_heads, work.spec.head_dim
    if what.startswith("qk norm"):
        parts = {"qk_norm_rope": 1.0}
    elif linear != "attention":
        return []
    elif what == "forward":
        parts = {"forward": 1.0}
    else:
        parts = {"dq": 3 / 7, "dkdv": 4 / 7}  # of its FLOP
    ours = choose_backend(arch, torch.bfloat16, C, shape.tokens)[0] == "triton"
    shares = {name: part if ours or name == "qk_norm_rope" else 0.0 for name, part in parts.items()}
    return [(Kernel(name, "dense", "half"), T, heads, C, part) for name, part in shares.items()]


def _rows(linear: str, shape: Shape) -> int:
    if "mod" in linear:
        return MODULATION_ROWS
    tokens = {"txt": shape.text_tokens, "img": shape.image_tokens}
    return shape.batch * tokens.get(linear.split(".")[2][:3], shape.tokens)


def _of_linear(work: StepSpec, linear: str, what: str, M: int, arch: int) -> tuple | None:
    """Kernel, M, N, K of one launch of a linear; None for passes that ask nothing."""
    (N, K), (P, _) = linear_shape(linear, work.spec), work.lora.modules.get(linear, (0, 0))
    R, products = work.lora.rank, work.precisions[linear].matmul
    gated = linear.endswith(("proj", "mlp.2", "linear2"))
    if what in ("product", "dx"):
        op = ("gemm_8bit" if products else "lora_gemm") + "_dx" * (what == "dx")
        if op == "gemm_8bit_dx" and linear.endswith("linear1"):
            op = "gemm_8bit_dx_pair"
        n, k = (N, K) if what == "product" else (K, N)
        dtype = products or "half"
        kept = dispatch.choose(op, arch, PRODUCT_DTYPE[dtype], "nf4", M, n, k).kind == "fused"
        storage = "nf4" if kept and work.stored_as(linear) == "nf4" else "dense"
        return Kernel(op, storage, dtype), M, n, k
    # codes of what another op made are written by the update's product
    if what in ("down", "down again"):
        codes = products and what == "down" and linear.endswith(("proj", "linear2"))
        return Kernel("lora_skinny" + "_8bit" * bool(codes), "dense", "half"), M, P * R, K
    if what == "d_down":
        codes = products and not gated
        return Kernel("lora_skinny" + "_8bit" * bool(codes), "dense", "half"), M, R, N
    if what in ("dA", "dB"):
        return Kernel("lora_grads", "dense", "half"), M, *((P * R, K) if what == "dA" else (R, N))
    return None
