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
from fluxfast.memory.planner.cost import Op, seconds
from fluxfast.memory.planner.step_spec import Shape, StepSpec, lora_of, shape_of
from fluxfast.model.modulation import MODULATION_ROWS
from fluxfast.model.names import linear_shape
from fluxfast.model.spec import FluxSpec

MATMUL_DTYPE = {"half": torch.bfloat16} | DTYPE
# torch has no product with the scales in it
ONE_WAY = [Kernel(op, "dense", "int8") for op in ("gemm_8bit", "gemm_8bit_pair")]


@dataclass(frozen=True)
class Problem:
    """One question to dispatch.

    M is 0 in a hand-over, where "fused" and "decode" are timed at rising M. linear: the BFL name of
    a linear that asks it, or "" for attention's kernels, where M is the tokens, N the heads and K
    their width. pass_name: the cost model's ("product", "dx", "down", "dA" …). share: of a step's
    time, as the cost model has it.
    """

    kernel: Kernel
    M: int
    N: int
    K: int
    linear: str
    pass_name: str
    share: float


def problems(
    spec: FluxSpec, card: Card, arch: int, sizes: Iterable[tuple[int, int]], rank: int
) -> list[Problem]:
    """The problems of steps at `sizes` (pixels a side, batch), the largest share first."""
    largest: dict[tuple, Problem] = {}
    for pixels, batch in sizes:
        shape = shape_of(pixels, pixels, batch, spec.text_length)
        for compute in ("bf16", "int8", "fp8"):
            if not card.peaks[compute]:
                continue
            step = StepSpec(spec, "nf4", compute, "bf16", lora_of(spec, rank))
            for key, problem in _of_step(step, shape, card, arch).items():
                if key not in largest or largest[key].share < problem.share:
                    largest[key] = problem
    return sorted(largest.values(), key=lambda p: -p.share)


def hand_overs(asked: list[Problem]) -> list[Problem]:
    """The hand-overs of every product among the problems, from each storage that has a second way.
    Their share is that of the product's least problem, so that its tiles are timed before."""
    products: dict[tuple, list[Problem]] = defaultdict(list)
    for problem in asked:
        if problem.pass_name in ("product", "dx"):
            products[problem.kernel.op, problem.kernel.dtype, problem.N, problem.K].append(problem)
    pairs = []
    for (op, dtype, _, _), same in products.items():
        blocks = [problem for problem in same if "mod" not in problem.linear] or same
        for kernel in KERNELS:
            if (kernel.op, kernel.dtype) == (op, dtype) and kernel not in ONE_WAY:
                pairs.append(replace(blocks[0], kernel=kernel, M=0, share=blocks[-1].share))
    return pairs


def _of_step(step: StepSpec, shape: Shape, card: Card, arch: int) -> dict[tuple, Problem]:
    ops = [op for op in cost.step_ops(step, shape) if "mod" not in op.name]
    whole = cost.total_seconds(ops, card)
    times = [(op, seconds(op, card)) for op in ops]
    # modulation is computed for several steps at once
    ahead = cost.modulation_ops(step, MODULATION_ROWS).forward
    times += [(op, seconds(op, card) * shape.batch / MODULATION_ROWS) for op in ahead]
    by_question: dict[tuple, Problem] = {}
    for op, time in times:
        linear, _, pass_name = op.name.partition(" ")
        for *key, part in _questions(step, op, shape, arch):
            same = by_question.get(tuple(key)) or Problem(*key, linear, pass_name, 0.0)
            by_question[tuple(key)] = replace(same, share=same.share + part * time / whole)
    return by_question


def _questions(step: StepSpec, op: Op, shape: Shape, arch: int) -> list[tuple]:
    """(kernel, M, N, K, part of the op's time) of each launch that asks dispatch."""
    linear, _, pass_name = op.name.partition(" ")
    if "blocks." in linear and linear.count(".") > 1:
        tokens = {"txt": shape.text_tokens, "img": shape.image_tokens}
        M = shape.batch * tokens.get(linear.split(".")[2][:3], shape.tokens)
        M = MODULATION_ROWS if "mod" in linear else M
        question = _of_linear(step, linear, pass_name, M, arch)
        return [] if question is None else [(*question, 1.0)]
    # one sample's tokens stand for all of attention
    T, heads, C = shape.tokens, step.spec.num_heads, step.spec.head_dim
    if pass_name.startswith("qk norm"):
        parts = {"qk_norm_rope": 1.0}
    elif linear == "attention":
        forward = pass_name == "forward"
        parts = {"forward": 1.0} if forward else {"dq": 3 / 7, "dkdv": 4 / 7}  # of its FLOP
        if choose_backend(arch, torch.bfloat16, C, T)[0] != "triton":
            parts = dict.fromkeys(parts, 0.0)  # torch's attention takes the time
    else:
        parts = {}
    return [(Kernel(name, "dense", "half"), T, heads, C, part) for name, part in parts.items()]


def _of_linear(step: StepSpec, linear: str, pass_name: str, M: int, arch: int) -> tuple | None:
    """(kernel, M, N, K) of one launch of a linear, None for a pass that does not ask dispatch."""
    (N, K), (P, _) = linear_shape(linear, step.spec), step.lora.modules.get(linear, (0, 0))
    R, matmul = step.lora.rank, step.precisions[linear].matmul
    if pass_name in ("product", "dx"):
        op = ("gemm_8bit" if matmul else "lora_gemm") + "_dx" * (pass_name == "dx")
        if matmul and linear.endswith("linear1" if pass_name == "dx" else "linear2"):
            op += "_pair"  # of two inputs
        N, K = (N, K) if pass_name == "product" else (K, N)
        dtype = matmul or "half"
        fused = dispatch.choose(op, arch, MATMUL_DTYPE[dtype], "nf4", M, N, K).fused
        storage = "nf4" if fused and step.stored_as(linear) == "nf4" else "dense"
        return Kernel(op, storage, dtype), M, N, K
    # these also quantize what another op wrote: the attention's output, and gradients without gate
    quantizing = {
        "down": linear.endswith(("proj", "linear2")),
        "d_down": not linear.endswith(("proj", "mlp.2", "linear2")),
    }
    skinny = "lora_skinny_8bit" if matmul and quantizing.get(pass_name) else "lora_skinny"
    shapes = {
        "down": (skinny, P * R, K),
        "down again": (skinny, P * R, K),
        "d_down": (skinny, R, N),
        "dA": ("lora_grads", P * R, K),
        "dB": ("lora_grads", R, N),
    }
    if pass_name not in shapes:
        return None
    op, *columns = shapes[pass_name]
    return Kernel(op, "dense", "half"), M, *columns
