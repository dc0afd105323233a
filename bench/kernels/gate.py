"""Is a candidate's work right? Outputs and gradients against a truth in a wider dtype.

The truth is the reference in fp64, or in fp32 (products without TF32) for the matrix products of
2-byte activations, from the same rounded inputs. Allowed is a multiple of what the reference itself
errs by in the dtype that is timed, and at least that multiple of LEAST. Both run one sample at a
time: no more memory than batch 1.
"""

import torch
from torch import Tensor

from bench.errors import compare, relative_errors
from bench.kernels.cases import Case
from bench.kernels.problem import BOTH, Function, Problem

# multiples by matmul. e4m3 on a GPU: tensor cores keep 13 bits of a sum and cut it often
MULTIPLE = {"": 2.0, "int8": 2.0, "fp8": 4.0}
LARGEST_MULTIPLE = 4.0  # of the largest difference, which varies more than a norm
# half a rounding; in fp32 eight, as sums are taken in another order
LEAST = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-10}
# of 8-bit values: a value that another rounding moves over a tie takes the other one
LEAST_8BIT = 2.0**-10

# what is wrong, or the error that was raised, or None; and what was compared
Verdict = tuple[str | Exception | None, dict[str, object]]


def outputs_and_gradients(
    function: Function,
    problem: Problem,
    inputs: dict[str, Tensor],
    dys: list[Tensor],
    direction: str,
) -> dict[str, Tensor]:
    """Returns outputs as y0, y1, … and, backward, the gradient of each trained input as dNAME."""
    ys = problem.outputs(function(**inputs))
    tensors = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    if direction == BOTH:
        grads = torch.autograd.grad(ys, [inputs[name] for name in problem.trained], dys)
        tensors |= {f"d{name}": grad for name, grad in zip(problem.trained, grads, strict=True)}
    return tensors


def by_sample(problem: Problem, wide: torch.dtype | None, samples: int) -> dict[str, Tensor]:
    """Returns what the reference gives in `wide` (None: in the dtypes of the inputs), computed
    sample by sample."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(wide) if wide else tensor.detach()

    results = []
    for b in range(samples):
        inputs = {
            name: cast(tensor if name in problem.shared else tensor[b : b + 1])
            for name, tensor in problem.inputs.items()
        }
        for name in problem.trained:
            inputs[name].requires_grad_()
        dys = [cast(dy[b : b + 1]) for dy in problem.dys]
        direction = problem.directions[-1]
        results.append(outputs_and_gradients(problem.reference, problem, inputs, dys, direction))
    summed = {f"d{name}" for name in problem.shared}
    return {
        name: (sum if name in summed else torch.cat)([result[name] for result in results])
        for name in results[0]
    }


class Gate:
    """Holds a case's truth and what each tensor may err by."""

    def __init__(self, problem: Problem, case: Case):
        samples = case.batch or 1
        self.problem = problem
        self.truth = by_sample(problem, problem.wide, samples)
        self.allowed = {}
        for name, eager in by_sample(problem, None, samples).items():
            least = LEAST_8BIT if case.matmul else LEAST[eager.dtype]
            norm, largest = (max(e, least) for e in relative_errors(eager, self.truth[name]))
            self.allowed[name] = MULTIPLE[case.matmul] * norm, LARGEST_MULTIPLE * largest

    def check(self, function: Function, direction: str) -> tuple[str | None, dict[str, object]]:
        """Returns what is wrong or None, and the tensor that errs most of what it may."""
        problem = self.problem
        results = outputs_and_gradients(function, problem, problem.inputs, problem.dys, direction)
        return compare(results, self.truth, self.allowed)


def verdicts(problem: Problem, case: Case) -> dict[tuple[str, str], Verdict]:
    """Returns the verdicts by (candidate, direction), when the truth's memory is free again."""
    judged: dict[tuple[str, str], Verdict] = {}
    try:
        gate: Gate | Exception = Gate(problem, case)
    except Exception as error:  # a truth that cannot be formed lets nobody through
        gate = error
    for name, function in problem.candidates.items():
        for direction in problem.directions:
            try:
                for built in (function, gate):
                    if isinstance(built, Exception):
                        raise built
                judged[name, direction] = gate.check(function, direction)
            except Exception as error:
                error.__traceback__ = None  # it holds the tensors of the failed call
                judged[name, direction] = error, {}
    return judged
