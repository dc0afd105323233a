"""The optimizer's half of a step: learning rate, clipping, a step that may be skipped, the moving
average; below it how optimizers are built, each from its own library.
"""

from __future__ import annotations

import difflib
import inspect
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fluxfast.errors import ConfigError

if TYPE_CHECKING:
    from fluxfast.config.schema import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Returns the learning rate at optimizer step `step`, counted from 0.

    Warm-up rises linearly over `warmup_steps` to `train.lr`, by default 1e-4, or 1.0 for prodigy,
    which finds its own; then constant, linear or cosine down to `lr_end` at `steps`. Schedule-free
    warms up by itself.
    """
    lr = train.lr
    if lr is None:
        lr = 1.0 if train.optimizer == "prodigy" else 1e-4
    if train.optimizer == "schedulefree":
        return lr
    if step < train.warmup_steps:
        return lr * ((step + 1) / (train.warmup_steps + 1))
    if train.lr_schedule == "constant":
        return lr
    done = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    left = 1 - done if train.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return train.lr_end + (lr - train.lr_end) * left


def clip_and_guard(
    gradients: Tensor, max_norm: float | None, loss: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clip all gradients (flat) to a total norm, and zero them where it or the loss (a scalar) is
    not finite. Does not synchronize with the device.

    A bad batch then moves nothing by its own gradient; `step_unless` keeps momentum from moving
    anything either. Returns the norm before clipping, and 1.0 where it was not finite, else 0.0:
    both fp32 scalars.
    """
    norm = torch.linalg.vector_norm(gradients)
    finite = torch.isfinite(norm if loss is None else norm + loss)
    factor = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # in place: beside a full pool of activations there is no room for copies. 0 · NaN is NaN, so
    # what is not finite is replaced, not multiplied
    gradients.mul_(factor).masked_fill_(~finite, 0.0)
    return norm, (~finite).float()


def step_unless(optimizer: Any, bad: Tensor) -> None:
    """Take one optimizer step, skipped where `bad` (fp32 scalar, see `clip_and_guard`) is 1.0. Does
    not synchronize with a GPU.

    Fused AdamW is masked on the device (torch's `found_inf`, as GradScaler uses it) and leaves
    parameters, moments and its step count as they are, bit for bit. The others, and AdamW that is
    configured or restored unfused, have no such mask: on a CPU their step is not taken; on a GPU it
    is, on gradients that `clip_and_guard` has zeroed, moved by momentum and weight decay alone.
    """
    if _is_masked(optimizer):
        optimizer.found_inf = bad  # the other AdamW steps assert that there is none
        optimizer.step()
        del optimizer.found_inf
    elif bad.device.type != "cpu" or not bad:
        optimizer.step()


def _is_masked(optimizer: torch.optim.Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


def skips_exactly(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Returns whether `step_unless` leaves parameters and state unchanged where a step is bad."""
    return device.type == "cpu" or _is_masked(optimizer)


class Ema:
    """An exponential moving average of the parameters, fp32; shadow: one view of it for each.

    shadow += (1 − decay)·(parameter − shadow) after every step; the decay warms up as (1 + n)/(10 +
    n), so that a short run's average is not its starting point. n is counted on the device, as only
    the device knows which steps were skipped.
    """

    def __init__(self, flat: FlatParameters, decay: float):
        self.decay, self._values = decay, flat.values
        self.updates = torch.zeros((), device=flat.values.device)
        self._average = flat.values.clone()
        self.shadow = flat.views(self._average)

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """Follow one step, unless `bad` (fp32 scalar on the device) is 1.0."""
        taken = 1 - bad
        self.updates += taken
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        self._average.lerp_(self._values, (1 - decay) * taken)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "average": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates.fill_(state["updates"])
        for shadow, saved in zip(self.shadow, state["average"], strict=True):
            shadow.copy_(saved)


# ---------------------------------------------------------------- around the steps


def set_mode(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Switch schedule-free between the weights to train at and those to save and sample. Does
    nothing to other optimizers.
    """
    mode: Any = getattr(optimizer, "train" if training else "eval", None)
    if callable(mode):
        mode()


@contextmanager
def eval_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, schedule-free's parameters are those to save and sample. Afterwards they are as
    before, bit for bit, from a copy on the host: switching back in fp32 would round.
    """
    if not callable(getattr(optimizer, "eval", None)):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    train_weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    set_mode(optimizer, training=False)
    try:
        yield
    finally:
        set_mode(optimizer, training=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, train_weights, strict=True):
                parameter.copy_(value)


# ---------------------------------------------------------------- one tensor for all parameters

MOST = 2**30  # elements of a piece: bitsandbytes and cuBLAS count them in 32 bits
_SHARED = ("qmap1", "qmap2")  # bitsandbytes' codes, the same for every parameter


class FlatParameters:
    """Trained parameters and their gradients as views of one flat fp32 tensor each, so that the
    optimizer's step, clipping and the moving average are single passes. Autograd adds into the
    views.

    pieces: what the optimizer takes: the flat tensor, or for adafactor, which factors matrices, the
    parameters. Each parameter starts at a multiple of 256 bytes, under adamw8bit of 256 elements,
    which share a scale. What lies between is zero, has no gradient, and is read by nothing.
    """

    def __init__(self, parameters: list[nn.Parameter], train: TrainConfig | None = None):
        name, args = ("", {}) if train is None else (train.optimizer, train.optimizer_args)
        self.parameters = parameters
        align, small = 64, 0
        self._per = {}  # key of the state -> elements of a parameter to one of its elements
        if name == "adamw8bit":
            align, small = 256, args.get("min_8bit_size", 4096)
            self._per = {"absmax1": 256, "absmax2": 256}
        elif name == "prodigy":
            sliced = args.get("slice_p", 1)
            align, self._per = math.lcm(align, sliced), {"s": sliced, "p0": sliced}
        self._sizes = [-(-p.numel() // align) * align for p in parameters]
        stay_fp32 = [p.numel() < small for p in parameters]
        self._members = _members(self._sizes, stay_fp32)  # of each piece, as they lie in it
        device, total = parameters[0].device, sum(self._sizes)
        self.values, self.gradients = (torch.zeros(total, device=device) for _ in range(2))
        views = self.views(self.values), self.views(self.gradients)
        for parameter, value, gradient in zip(parameters, *views, strict=True):
            parameter.data = value.copy_(parameter.detach())
            parameter.grad = gradient
        self.pieces, self.small = parameters, []
        if name == "adafactor":
            return
        lengths = [sum(self._sizes[index] for index in members) for members in self._members]
        self.pieces = [nn.Parameter(piece) for piece in self.values.split(lengths)]
        for piece, gradient in zip(self.pieces, self.gradients.split(lengths), strict=True):
            piece.grad = gradient
        pairs = zip(self.pieces, self._members, strict=True)
        self.small = [piece for piece, members in pairs if stay_fp32[members[0]]]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Returns each parameter's part of a tensor like `values`, in its shape."""
        order = [index for members in self._members for index in members]
        parts = flat.split([self._sizes[index] for index in order])
        views = dict(zip(order, parts, strict=True))
        return [views[i][: p.numel()].view_as(p) for i, p in enumerate(self.parameters)]

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state as it is without a flat tensor: of each parameter."""
        saved = optimizer.state_dict()
        if self.pieces is self.parameters:
            return saved
        state: dict[int, Any] = {}
        for piece, members in enumerate(self._members):
            state |= dict(zip(members, self._split(members, saved["state"][piece]), strict=True))
        (group,) = saved["param_groups"]
        indices = range(len(self.parameters))
        return {
            "state": {index: state[index] for index in indices},
            "param_groups": [{**group, "params": [*indices]}],
        }

    def load_state_dict(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """Restore the optimizer from what `state_dict` returned, or the optimizer of a version that
        had no flat tensor.
        """
        optimizer.state.clear()  # two would not fit beside each other
        if self.pieces is not self.parameters:
            (group,), state = saved["param_groups"], saved["state"]
            saved = {
                "state": {
                    piece: self._join(members, [state[index] for index in members])
                    for piece, members in enumerate(self._members)
                    if state
                },
                "param_groups": [{**group, "params": [*range(len(self.pieces))]}],
            }
        optimizer.load_state_dict(saved)
        if not optimizer.state:  # saved before the first step
            _make_state(optimizer, self)

    def _split(self, members: list[int], state: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the state of each of a piece's parameters."""
        split: list[dict[str, Any]] = [{} for _ in members]
        for key, value in state.items():
            if isinstance(value, dict):  # bitsandbytes nests its own
                parts: Any = self._split(members, value)
            elif not _has_elements(key, value):
                parts = [value] * len(members)
            else:
                per = self._per.get(key, 1)
                parts = value.split([self._sizes[index] // per for index in members])
                counts = [-(-self.parameters[index].numel() // per) for index in members]
                parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
                if key not in self._per:
                    shapes = [self.parameters[index].shape for index in members]
                    parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            for own, part in zip(split, parts, strict=True):
                own[key] = part
        return split

    def _join(self, members: list[int], states: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns a piece's state from that of its parameters: the inverse of `_split`."""
        joined: dict[str, Any] = {}
        for key, value in states[0].items():
            values = [state[key] for state in states]
            if isinstance(value, dict):
                value = self._join(members, values)
            elif any(_has_elements(key, each) for each in values):
                per, zero = self._per.get(key, 1), 0
                if value.dtype == torch.uint8:
                    zero = int((states[0][f"qmap{key[-1]}"] == 0).nonzero())
                sizes = [self._sizes[index] // per for index in members]
                value = torch.full((sum(sizes),), zero, dtype=value.dtype)
                for index, part, own in zip(members, value.split(sizes), values, strict=True):
                    # prodigy's p0 is one zero for a parameter that was zero
                    part[: -(-self.parameters[index].numel() // per)] = own.flatten()
            joined[key] = value
        return joined


def _members(sizes: list[int], small: list[bool]) -> list[list[int]]:
    """Returns the indices of each piece's parameters: the small ones behind the others."""
    members: list[list[int]] = []
    for kind in (False, True):
        length = MOST
        for index in (index for index, each in enumerate(small) if each == kind):
            length += sizes[index]
            if length > MOST:
                members.append([])
                length = sizes[index]
            members[-1].append(index)
    return members


def _has_elements(key: str, value: Any) -> bool:
    """Returns whether a part of the state has elements of its own for each of a parameter's."""
    return isinstance(value, Tensor) and value.ndim > 0 and key not in _SHARED


@torch.no_grad()
def _make_state(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> None:
    """Make the state that the first step makes, and change nothing: a lack of memory then shows
    before the pass's activations have taken theirs, where policies can become cheaper.

    By a step on zero gradients at a learning rate of 0, whose traces are undone.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    for piece in flat.small:  # bitsandbytes goes by a tensor's size, which is that of many here
        moments = {key: torch.zeros_like(piece) for key in ("state1", "state2")}
        optimizer.state[piece] = {"step": 0, **moments}
    set_mode(optimizer, training=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    flat.gradients.zero_()
    optimizer.step()
    flat.gradients.zero_()  # weight decay that is coupled is added to them
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                state[key] = 0  # the step
            elif key not in (*_SHARED, "z", "p0"):  # z and p0 are copies of the parameters
                value.zero_()


# ---------------------------------------------------------------- how optimizers are built


def build_optimizer(train: TrainConfig, flat: FlatParameters) -> torch.optim.Optimizer:
    """Returns the optimizer named in the configuration, with its state. Raises ConfigError as
    `check_optimizer`.
    """
    make = check_optimizer(train, flat.values.device)
    with redirect_stdout(sys.stderr):  # prodigy prints a line
        optimizer = make(flat.pieces)
    _make_state(optimizer, flat)
    return optimizer


def check_optimizer(train: TrainConfig, device: torch.device) -> Callable[[Any], Any]:
    """Returns what makes the optimizer named in the configuration, with `optimizer_args` passed on
    to it. Raises ConfigError for an argument that it does not take, or a missing library.
    """
    name = train.optimizer
    if name == "schedulefree" and train.lr_schedule != "constant":
        raise ConfigError(
            "optimizer schedulefree replaces the schedule: lr_schedule must be constant"
        )
    try:
        kind, defaults = _class_and_defaults(train)
    except Exception as error:  # bitsandbytes has its own where its CUDA part does not load
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"optimizer {name} needs the library {_LIBRARY[name]}, which does not load: {reason}",
            hint=f"pip install {_LIBRARY[name]}; train.optimizer: adamw needs none",
        ) from None
    args = _checked_args(kind, train)
    make = partial(kind, lr=learning_rate(0, train), **defaults)
    if failed := _fault(partial(make, **args), device):
        words = f"optimizer {name} does not work here"
        for key, value in args.items():  # the one that fails by itself
            if own := _fault(partial(make, **{key: value}), device):
                failed, words = own, f"optimizer_args of {name}: {key} {value!r} cannot be"
                break
        raise ConfigError(f"{words}: {failed}")
    return partial(make, **args)


def _checked_args(kind: type, train: TrainConfig) -> dict[str, Any]:
    """Returns `optimizer_args` in the types that the optimizer's own defaults have."""
    where = f"optimizer_args of {train.optimizer}"
    taken = {key: p.default for key, p in inspect.signature(kind).parameters.items()}
    del taken["params"], taken["lr"]
    args = dict(train.optimizer_args)
    for key, value in args.items():
        if key not in taken:
            close = difflib.get_close_matches(key, taken, n=1)
            raise ConfigError(
                f"{where}: there is no {key!r}"
                + (f", did you mean {close[0]!r}?" if close else ""),
                hint="the learning rate is train.lr"
                if key == "lr"
                else f"it takes {', '.join(taken)}",
            )
        match taken[key]:
            case bool():
                fits, words = value in (0, 1), "true or false"
                args[key] = bool(value)
            case int() | float() as default:
                fits, words = _is_number(value), f"a number such as {default}"
            case tuple() as default:
                args[key] = value = tuple(value) if isinstance(value, list) else value
                fits = isinstance(value, tuple) and len(value) == len(default)
                fits = fits and all(map(_is_number, value))
                words = f"{len(default)} numbers such as {list(default)}"
            case _:
                continue
        if not fits:
            raise ConfigError(f"{where}: {key} takes {words} (got {train.optimizer_args[key]!r})")
    return args


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fault(make: Callable[[Any], Any], device: torch.device) -> str:
    """Returns why an optimizer takes no step, tried as many arguments are read in a step only."""
    # bitsandbytes keeps fewer in 32 bits
    trial = FlatParameters([nn.Parameter(torch.zeros(4096, device=device))])
    try:
        with redirect_stdout(io.StringIO()):
            optimizer = make(trial.pieces)
            _make_state(optimizer, trial)
            set_mode(optimizer, training=True)
            optimizer.step()
    except Exception as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


# the library that an optimizer comes from
_LIBRARY = {
    "adamw": "torch",
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
    "adafactor": "transformers",
}


def _class_and_defaults(train: TrainConfig) -> tuple[type, dict[str, Any]]:
    match train.optimizer:
        case "adamw":
            # fused on a CPU too: only the fused step can be masked, see `step_unless`
            args = train.optimizer_args
            fused = not (args.get("foreach") or args.get("differentiable"))
            return torch.optim.AdamW, {"fused": fused}
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit, {}
        case "prodigy":
            from prodigyopt import Prodigy

            # during a warm-up the estimate of d must not see the small first steps
            return Prodigy, {"safeguard_warmup": train.warmup_steps > 0}
        case "schedulefree":
            from schedulefree import AdamWScheduleFree

            return AdamWScheduleFree, {"warmup_steps": train.warmup_steps}
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor, {"relative_step": False, "scale_parameter": False}
