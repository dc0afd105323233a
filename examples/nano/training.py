"""The loop that every part of the nano model is trained with: seeded, timed and resumable."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fluxfast.formats.container import write
from fluxfast.run.checkpoint import flatten_state, unflatten_state

SAVE_EVERY_S = 60.0
LOG_EVERY = 50


@dataclass(frozen=True)
class Plan:
    """How a part is trained. The learning rate rises over `warmup` steps, stays at `lr` and falls
    to nothing over the last `decay` of the way, measured in steps or in minutes, whichever is
    further on. So a run that `minutes` does not cut gives the same weights again.
    """

    steps: int
    lr: float
    minutes: float = math.inf  # of training, all resumed runs together
    warmup: int = 50
    decay: float = 0.5
    weight_decay: float = 0.0
    ema: float = 0.0  # decay of the averaged weights; 0: none are kept
    clip: float = 1.0  # of the gradient's norm
    betas: tuple[float, float] = (0.9, 0.99)
    seed: int = 0

    def rate(self, step: int, minutes: float) -> float:
        """The learning rate at `step`, after `minutes` of training."""
        done = self.progress(step, minutes)
        fall = min(1.0, max(0.0, (1.0 - done) / self.decay))
        return self.lr * min(1.0, (step + 1) / self.warmup) * fall

    def progress(self, step: int, minutes: float) -> float:
        return max(step / self.steps, minutes / self.minutes)


def train(
    name: str,
    work: Path,
    model: nn.Module,
    plan: Plan,
    loss_of: Callable[[int, torch.Generator], Tensor],
    note: Callable[[], str] = str,
) -> nn.Module:
    """Train `model` in place by AdamW and return it, with the averaged weights if `plan.ema`.

    `loss_of(step, generator)` computes a step's loss; its generator depends on the seed and the
    step alone. The state is saved to `work/name.safetensors` once a minute and at the end; a later
    call goes on from there, and returns at once where the training had ended. `note` adds to the
    log's lines.
    """
    path = work / f"{name}.safetensors"
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(
        weights, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True
    )
    average = [weight.detach().clone() for weight in weights] if plan.ema else []
    step, minutes, finished = _resume(path, model, optimiser, average)
    started = saved = time.monotonic() - 60 * minutes
    smooth = math.nan

    model.train()
    while not finished:
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step, minutes)
        generator = torch.Generator().manual_seed(plan.seed * 10_000_019 + step)
        loss = loss_of(step, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, plan.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if average:
            keep = min(plan.ema, (1 + step) / (10 + step))  # a short memory at first
            torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - keep)

        now = time.monotonic()
        minutes = (now - started) / 60
        value = loss.item()
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        if step % LOG_EVERY == 0:
            print(f"{name} {step:5d} {minutes:6.2f} min  loss {smooth:.4f}  {note()}", flush=True)
        finished = plan.progress(step, minutes) >= 1
        if finished or now - saved > SAVE_EVERY_S:
            saved = now
            _save(path, model, optimiser, average, (step, minutes, finished))
    with torch.no_grad():
        for weight, averaged in zip(weights, average, strict=False):
            weight.copy_(averaged)
    print(f"{name}: {step} steps, {minutes:.1f} minutes", flush=True)
    return model.eval()


def _save(path: Path, model, optimiser, average: list[Tensor], position: tuple) -> None:
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "average": average,
        "position": position,  # step, minutes, whether the training has ended
    }
    rest, tensors = flatten_state(state)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        write(file, tensors, {"rest": json.dumps(rest)})
    part.replace(path)


def _resume(path: Path, model, optimiser, average: list[Tensor]) -> tuple[int, float, bool]:
    if not path.is_file():
        return 0, 0.0, False
    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["rest"])
        # copies: what is read lies in the file's own pages, which the optimiser writes into
        state = unflatten_state(rest, lambda key: file.get_tensor(key).clone())
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    for mine, saved in zip(average, state["average"], strict=True):
        mine.copy_(saved)
    return state["position"]
