"""Is a candidate's work right? Outputs and gradients against a truth in a wider dtype.

The truth is the reference in fp64, or in fp32 (products without TF32) for the matrix products of
2-byte activations, from the same rounded inputs. A tensor errs by the norm of its difference over
the truth's norm, and by its largest difference over the truth's largest value, which shows what few
wrong elements hide. Allowed is a multiple of what the reference itself errs by in the dtype that is
timed, and at least that multiple of LEAST. Both run one sample at a time: no more memory than
batch 1.
"""

import math

import torch
from torch import Tensor

from bench.kernels.cases import Case
from bench.kernels.problem import BOTH, Function, Problem

# by kind of products. e4m3 on a GPU: tensor cores keep 13 bits of a sum and cut it often
TIMES = {"": 2.0, "int8": 2.0, "fp8": 4.0}
PEAK_TIMES = 4.0  # of the largest difference, which varies more than a norm
# half a rounding; in fp32 eight, as sums are taken in another order
LEAST = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-10}
# of 8-bit codes: a value that another rounding moves over a tie takes the other code
LEAST_CODED = 2.0**-10


def evidence(
    function: Function,
    problem: Problem,
    inputs: dict[str, Tensor],
    dys: list[Tensor],
    direction: str,
) -> dict[str, Tensor]:
    """Outputs as y0, y1, … and, backward, the gradient of each trained input by its name."""
    ys = problem.outputs(function(**inputs))
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    if direction == BOTH:
        grads = torch.autograd.grad(ys, [inputs[name] for name in problem.trained], dys)
        found |= {f"d{name}": grad for name, grad in zip(problem.trained, grads, strict=True)}
    return found


def by_sample(problem: Problem, wide: torch.dtype | None, samples: int) -> dict[str, Tensor]:
    """The reference's evidence in `wide` (None: as the inputs are), sample by sample."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(wide) if wide else tensor.detach()

    found = []
    for b in range(samples):
        inputs = {
            name: cast(tensor if name in problem.shared else tensor[b : b + 1])
            for name, tensor in problem.inputs.items()
        }
        for name in problem.trained:
            inputs[name].requires_grad_()
        dys = [cast(dy[b : b + 1]) for dy in problem.dys]
        direction = problem.directions[-1]
        found.append(evidence(problem.reference, problem, inputs, dys, direction))
    summed = {f"d{name}" for name in problem.shared}
    return {
        name: sum(each[name] for each in found)
        if name in summed
        else torch.cat([each[name] for each in found])
        for name in found[0]
    }


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """-> relative error of the norm and of the largest difference; infinite where `found` is not
    finite or has another shape."""
    if found.shape != truth.shape or not torch.isfinite(found).all():
        return float("inf"), float("inf")
    difference = found.to(truth.dtype) - truth

    def of(order: float) -> float:
        size = float(torch.linalg.vector_norm(truth, order))
        return float(torch.linalg.vector_norm(difference, order)) / max(size, 1e-300)

    return of(2), of(torch.inf)


class Gate:
    """Holds a case's truth and what each tensor may err by."""

    def __init__(self, problem: Problem, case: Case):
        samples = case.batch or 1
        self.problem = problem
        self.truth = by_sample(problem, problem.wide, samples)
        self.allowed = {}
        for name, eager in by_sample(problem, None, samples).items():
            least = LEAST_CODED if case.products else LEAST[eager.dtype]
            norm, peak = (max(error, least) for error in errors(eager, self.truth[name]))
            self.allowed[name] = TIMES[case.products] * norm, PEAK_TIMES * peak

    def check(self, function: Function, direction: str) -> tuple[str | None, dict[str, object]]:
        """-> (what is wrong or None, the tensor that errs most of what it may)."""
        problem = self.problem
        found = evidence(function, problem, problem.inputs, problem.dys, direction)
        wrong, worst = None, (-1.0, {})
        for name, tensor in found.items():
            pairs = zip(errors(tensor, self.truth[name]), self.allowed[name], strict=True)
            for (error, allowed), of in zip(pairs, ("norm", "largest value"), strict=True):
                if error > allowed:
                    wrong = wrong or (
                        f"{name} errs by {error:.2e} of its {of}, allowed {allowed:.2e}"
                    )
                finite = error if math.isfinite(error) else None  # JSON has no infinity
                seen = {"worst": name, "worst_error": finite, "tolerance": allowed}
                worst = max(worst, (error / allowed, seen), key=lambda pair: pair[0])
        return wrong, worst[1]


# what is wrong, or the error that was raised, or None; and what was compared
Verdict = tuple[str | Exception | None, dict[str, object]]


def verdicts(problem: Problem, case: Case) -> dict[tuple[str, str], Verdict]:
    """By (candidate, direction). The truth's memory is free again when this returns."""
    found: dict[tuple[str, str], Verdict] = {}
    try:
        gate: Gate | Exception = Gate(problem, case)
    except Exception as error:  # a truth that cannot be formed lets nobody through
        gate = error
    for name, function in problem.candidates.items():
        for direction in problem.directions:
            try:
                if isinstance(function, Exception) or isinstance(gate, Exception):
                    raise function if isinstance(function, Exception) else gate
                found[name, direction] = gate.check(function, direction)
            except Exception as error:
                error.__traceback__ = None  # it holds the tensors of the failed call
                found[name, direction] = error, {}
    return found
